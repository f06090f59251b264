"""The drop-in packages `fla` and `causal_conv1d` themselves."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

DISTRIBUTION = Path(__file__).resolve().parents[2] / "compat" / "fla"
DROP_INS = DISTRIBUTION / "gated_deltanet_fla"


def test_layer_quick_start():
    from fla.layers import GatedDeltaNet

    layer = GatedDeltaNet(
        hidden_size=512,
        expand_v=2.0,
        head_dim=64,
        num_heads=8,
        mode="chunk",
        use_gate=True,
        use_short_conv=True,
    )
    output, _, _ = layer(torch.randn(2, 128, 512))
    assert output.shape == (2, 128, 512)


def test_model_quick_start():
    from fla.models import GatedDeltaNetConfig, GatedDeltaNetForCausalLM

    config = GatedDeltaNetConfig(
        hidden_size=768, num_hidden_layers=12, num_heads=12, head_dim=64, vocab_size=50257
    )
    model = GatedDeltaNetForCausalLM(config)
    with torch.no_grad():
        assert model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 50257)


def test_names_are_those_of_gated_deltanet():
    import fla.layers
    import fla.models
    import fla.modules
    import fla.ops
    import fla.ops.gated_delta_rule
    import gated_deltanet.layers
    import gated_deltanet.models
    import gated_deltanet.modules
    import gated_deltanet.ops

    for name in ("chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule"):
        operator = getattr(gated_deltanet.ops, name)
        assert getattr(fla.ops, name) is operator
        assert getattr(fla.ops.gated_delta_rule, name) is operator
    assert fla.layers.GatedDeltaNet is gated_deltanet.layers.GatedDeltaNet
    assert fla.models.GatedDeltaNetConfig is gated_deltanet.models.GatedDeltaNetConfig
    for name in ("FusedRMSNormGated", "RMSNorm", "ShortConvolution"):
        assert getattr(fla.modules, name) is getattr(gated_deltanet.modules, name)


def convolve(x, weight, bias, state, activation):
    """The definition in fp64: x [B, D, T], state [B, D, W - 1]."""
    x, weight, state = x.double(), weight.double(), state.double()
    y = torch.nn.functional.conv1d(
        torch.cat([state, x], -1), weight[:, None], bias.double(), groups=weight.shape[0]
    )
    return torch.nn.functional.silu(y) if activation else y


@pytest.mark.parametrize("activation", [None, "silu"])
def test_causal_conv1d(activation):
    from causal_conv1d import causal_conv1d_fn

    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 6, 9), torch.randn(6, 4), torch.randn(6)
    state = torch.randn(2, 6, 3)
    exact = convolve(x, weight, bias, torch.zeros(2, 6, 3), activation)
    torch.testing.assert_close(
        causal_conv1d_fn(x, weight, bias, activation=activation), exact.float()
    )
    y, final = causal_conv1d_fn(x, weight, bias, None, state, True, activation=activation)
    torch.testing.assert_close(y, convolve(x, weight, bias, state, activation).float())
    assert torch.equal(final, x[..., -3:])

    seq_idx = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2], [4, 4, 4, 4, 4, 4, 4, 4, 4]])
    packed = causal_conv1d_fn(x, weight, bias, seq_idx, activation=activation)
    for row, begin, end in ((0, 0, 3), (0, 3, 7), (0, 7, 9), (1, 0, 9)):
        alone = x[row : row + 1, :, begin:end]
        exact = convolve(alone, weight, bias, torch.zeros(1, 6, 3), activation)
        torch.testing.assert_close(packed[row : row + 1, :, begin:end], exact.float())


@pytest.mark.parametrize("size", [3, 4, 6])
@pytest.mark.parametrize("count", [1, 2, 7])
def test_causal_conv1d_update(size, count):
    from causal_conv1d import causal_conv1d_update

    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 6, count), torch.randn(6, 4), torch.randn(6)
    state = torch.randn(2, 6, size)
    exact = convolve(x, weight, bias, state[..., -3:], "silu").float()
    expected_state = torch.cat([state, x], -1)[..., -size:]
    one = x[..., 0] if count == 1 else x  # [B, D] is one token
    y = causal_conv1d_update(one, state, weight, bias, "silu")
    torch.testing.assert_close(y, exact.reshape(one.shape))
    assert torch.equal(state, expected_state)


def test_causal_conv1d_says_what_does_not_fit():
    from causal_conv1d import causal_conv1d_fn, causal_conv1d_update

    x, weight = torch.randn(1, 6, 9), torch.randn(6, 4)
    seq_idx = torch.zeros(1, 9, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"seq_idx .*\[1, 9\].*\[1, 8\]"):
        causal_conv1d_fn(x, weight, seq_idx=seq_idx[:, :8])
    with pytest.raises(ValueError, match="return_final_states"):
        causal_conv1d_fn(x, weight, seq_idx=seq_idx, return_final_states=True)
    with pytest.raises(ValueError, match=r"conv_state.*S >= 3"):
        causal_conv1d_update(x, torch.zeros(1, 6, 2), weight)
    with pytest.raises(ValueError, match="cu_seqlens"):
        causal_conv1d_fn(x, weight, cu_seq_lens_q=torch.tensor([0, 4]))
    with pytest.raises(ValueError, match="weight"):
        causal_conv1d_fn(x, torch.randn(5, 4))


def run_python(code, *path):
    """Runs code with nothing but the standard library and `path`."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))}
    return subprocess.run(
        [sys.executable, "-S", "-c", code],
        capture_output=True,
        text=True,
        env=environment,
        timeout=60,
    )


def installed(folder, distribution, version):
    """What pip leaves of a distribution for importlib.metadata."""
    info = folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n"
    )


@pytest.mark.parametrize(
    ("package", "distribution"),
    [("fla", "flash-linear-attention"), ("fla", "fla-core"), ("causal_conv1d", "causal-conv1d")],
)
def test_nobody_is_shadowed(tmp_path, package, distribution):
    installed(tmp_path, distribution, "9.8.7")
    result = run_python(f"import {package}", DROP_INS, tmp_path)
    assert result.returncode != 0
    message = result.stderr.splitlines()[-1]
    assert f"ImportError: {distribution} 9.8.7 is installed" in message
    assert f"pip uninstall {distribution}" in message


def test_wheel_overwrites_no_file_of_others(tmp_path):
    """In the wheel nothing lies where flash-linear-attention or causal-conv1d put their files."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=DISTRIBUTION, check=True, capture_output=True, timeout=60)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {
        "gated_deltanet_fla.pth",
        "gated_deltanet_fla",
    }
    assert "gated_deltanet_fla/fla/ops/gated_delta_rule/__init__.py" in names
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")

    # As site does it: the folders that .pth files name come after everything else.
    code = "import site; site.addsitedir({!r}); import fla; print(fla.__file__)".format(
        str(tmp_path / "site")
    )
    found = Path(run_python(code).stdout.strip())
    assert found == tmp_path / "site" / "gated_deltanet_fla" / "fla" / "__init__.py"
    theirs = tmp_path / "theirs" / "fla"
    theirs.mkdir(parents=True)
    (theirs / "__init__.py").touch()
    assert Path(run_python(code, theirs.parent).stdout.strip()) == theirs / "__init__.py"
