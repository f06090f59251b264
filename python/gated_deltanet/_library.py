"""Finds and loads libgdn_ops.so, which registers `torch.ops.gdn`."""

import os
from importlib import metadata
from pathlib import Path

import torch

_NAME = "libgdn_ops.so"
_VARIABLE = "GDN_OPS_LIBRARY"


def candidates() -> list[Path]:
    """Where the library may be, in the order in which it is looked for.

    The file that the environment variable GDN_OPS_LIBRARY names, and then nothing else; beside the
    installed package; in the source tree's build folders, when the package is one of that tree: the
    build for GPUs first, which serves CPUs too.
    """
    if named := os.environ.get(_VARIABLE):
        return [Path(named)]
    package = package_folders()
    source = Path(__file__).resolve().parents[2]
    builds = [source / "build" / preset / "lib" / _NAME for preset in ("cuda", "release", "debug")]
    return [path / _NAME for path in package] + builds


def package_folders() -> list[Path]:
    """The package's folders: two in an editable installation, one of them with the library."""
    import gated_deltanet

    return [Path(path) for path in gated_deltanet.__path__]


def load() -> Path:
    """Loads the library once, and returns its path. Raises ImportError with what was tried."""
    tried = candidates()
    for path in tried:
        if path.is_file():
            try:
                torch.ops.load_library(path)
            except OSError as error:
                raise ImportError(
                    f"gated_deltanet: {path} does not load into torch {torch.__version__} (it was "
                    f"built for another?): {error}"
                ) from error
            return path
    raise ImportError(
        f"gated_deltanet: {_NAME} must be in one of {[str(path) for path in tried]}, found none: "
        f"run `make build`, `pip install .`, or set {_VARIABLE}"
    )


def version() -> str:
    """The installed version, or "0+source" when the package runs from a source tree alone."""
    try:
        return metadata.version("gated-deltanet")
    except metadata.PackageNotFoundError:
        return "0+source"


LIBRARY = load()
