"""The package as it is installed and documented: import, wheel, README, guide, docstrings, site."""

import doctest
import importlib
import pkgutil
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT

import gated_deltanet

LIBRARY = gated_deltanet._library.LIBRARY
MODULES = [
    module.name for module in pkgutil.walk_packages(gated_deltanet.__path__, "gated_deltanet.")
]


def python(code, **options):
    line = [sys.executable, "-c", code]
    result = subprocess.run(line, capture_output=True, text=True, timeout=120, **options)
    assert result.returncode == 0, result.stderr
    return result.stdout


def python_blocks(path):
    blocks = re.findall(r"(?s)```python\n(.*?)```", path.read_text())
    assert blocks
    return blocks


def test_import_is_quick_and_touches_neither_gpu_nor_transformers():
    code = """
import sys, time, torch
begin = time.process_time()
import gated_deltanet
print(time.process_time() - begin)
assert not torch.cuda.is_initialized()
assert "transformers" not in sys.modules
"""
    assert min(float(python(code)) for _ in range(2)) < 0.5


@pytest.mark.parametrize("number", [0, 1])
def test_readme_quick_starts(number):
    block = python_blocks(ROOT / "README.md")[number]
    scope = {}
    exec(block, scope)
    if number == 0:
        assert scope["output"].shape == (2, 128, 512)
    else:
        assert scope["text"].shape[1] > 64


def test_guide():
    exec("".join(python_blocks(ROOT / "docs/python/index.md")), {})


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name):
    module = importlib.import_module(name)
    assert doctest.testmod(module).failed == 0
    for public in getattr(module, "__all__", ()):
        assert getattr(module, public).__doc__, f"{name}.{public} has no docstring"


def test_examples_are_found():
    finder = doctest.DocTestFinder()
    found = sum(
        bool(test.examples)
        for name in MODULES
        for test in finder.find(importlib.import_module(name))
    )
    assert found >= 5


def test_documentation_builds(tmp_path):
    line = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path]
    result = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    reference = (tmp_path / "reference/index.html").read_text()
    for public in gated_deltanet.__all__:
        assert public in reference, public


def test_wheel(tmp_path):
    """What make wheel makes works alone: its library and, from the system, torch."""
    build = LIBRARY.parents[1]
    if not (build / "build.ninja").is_file():
        pytest.skip(f"{LIBRARY} is not in a build folder")
    line = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation",
            "--disable-pip-version-check", "-C", f"build-dir={tmp_path / 'build'}",
            "-C", f"cmake.define.GDN_BUILT_IN={build}", "-w", tmp_path, ROOT]  # fmt: skip
    result = subprocess.run(line, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert re.fullmatch(r"gated_deltanet-[\d.]+-py3-none-linux_\w+\.whl", wheel.name)
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    package = tmp_path / "installed/gated_deltanet"
    assert {"libgdn_ops.so", "py.typed"} <= {path.name for path in package.iterdir()}
    sources = {path.relative_to(ROOT / "python") for path in (ROOT / "python").rglob("*.py")}
    installed = {path.relative_to(package.parent) for path in package.rglob("*.py")}
    assert installed == sources
    code = """
import sys
sys.meta_path[:] = [f for f in sys.meta_path if "skbc" not in type(f).__module__]  # editable
import torch, gated_deltanet
print(gated_deltanet._library.LIBRARY)
gated_deltanet.GatedDeltaNet(32, 1.0, 8, 2)(torch.randn(1, 70, 32))[0].sum().backward()
"""
    environment = {"PYTHONPATH": str(package.parent), "PATH": "/usr/bin"}
    assert Path(python(code, env=environment, cwd="/").strip()) == package / "libgdn_ops.so"


def test_a_missing_library_is_named(tmp_path):
    missing = tmp_path / "libgdn_ops.so"
    path = str(Path(gated_deltanet.__file__).parents[1])
    line = [sys.executable, "-c", "import gated_deltanet"]
    for content, message in (
        (None, "found none: run `make build`"),
        (b"not a library", "does not load into torch"),
    ):
        if content is not None:
            missing.write_bytes(content)
        environment = {"PYTHONPATH": path, "GDN_OPS_LIBRARY": str(missing)}
        result = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=60)
        assert result.returncode != 0 and str(missing) in result.stderr
        assert f"ImportError: gated_deltanet: {'' if content is None else missing}" in result.stderr
        assert message in result.stderr
