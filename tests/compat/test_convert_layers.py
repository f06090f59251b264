"""`gdn convert` on model folders that transformers wrote: our layers compute what theirs do, and
the way back gives transformers its folder again. Errors are in tests/models/test_convert.cpp."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
import transformers
from families import FAMILIES, SIZES, Family, assert_as_accurate, exact_copy, exact_path, torch_path
from safetensors.torch import load_file, save_file

from gated_deltanet.layers import GatedDeltaNet

ROOT = Path(__file__).resolve().parents[2]
GDN = os.environ.get("GDN_COMMAND", ROOT / "build/release/bin/gdn")


def convert(*arguments):
    result = subprocess.run(
        [GDN, "convert", *map(str, arguments)], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def with_images() -> transformers.PreTrainedModel:
    vision = {
        "depth": 1,
        "hidden_size": 32,
        "num_heads": 2,
        "out_hidden_size": SIZES["hidden_size"],
    }
    return transformers.Qwen3_5ForConditionalGeneration(
        transformers.Qwen3_5Config(
            text_config=transformers.Qwen3_5TextConfig(**SIZES, head_dim=16).to_dict(),
            vision_config=vision | {"intermediate_size": 32, "num_position_embeddings": 16},
        )
    )


MODELS = FAMILIES | {"qwen3_5 with images": Family("qwen3_5", with_images)}


@pytest.fixture(params=MODELS, name="converted")
def _converted(request, tmp_path):
    """Family, model in bf16, its folder, and the folder of converted layers."""
    family = MODELS[request.param]
    model = family.model(torch.bfloat16)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="50KB")
    printed = convert("--model", tmp_path / "theirs", "--out", tmp_path / "ours")
    assert "39 tensors of 3 Gated DeltaNet layers" in printed
    return family, model, tmp_path / "theirs", tmp_path / "ours"


def load_layer(folder: Path, index: int) -> GatedDeltaNet:
    options = json.loads((folder / "config.json").read_text())
    assert options.pop("model_type") == "gated_deltanet_layers"
    assert options.pop("layers") == [0, 1, 2]
    layer = GatedDeltaNet(**options, layer_idx=index)
    prefix = f"model.layers.{index}.attn."
    weights = load_file(folder / "model.safetensors").items()
    layer.load_state_dict({k.removeprefix(prefix): v for k, v in weights if k.startswith(prefix)})
    return layer.eval()


def linear_attention(model, index):
    text = model.model.language_model if hasattr(model.model, "language_model") else model.model
    return text.layers[index].linear_attn


@torch.no_grad()
def test_layers_compute_the_same(converted):
    family, model, _, folder = converted
    model = model.float()
    torch.manual_seed(1)
    x = torch.randn(2, 70, SIZES["hidden_size"])
    for index in range(3):
        ours = load_layer(folder, index)(x)[0]
        with torch_path(family):
            theirs = linear_attention(model, index)(x)
        with exact_path(family):
            exact = linear_attention(exact_copy(model), index)(x.double())
        assert_as_accurate(ours, theirs, exact, f"layer {index}")


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_back_is_the_same_bytes(converted, tmp_path):
    _, _, theirs, ours = converted
    convert("--model", ours, "--base", theirs, "--out", tmp_path / "back")
    assert len(contents(theirs)) > 3  # sharded
    assert contents(tmp_path / "back") == contents(theirs)


def test_trained_layers_reach_transformers(converted, tmp_path):
    _, model, theirs, ours = converted
    weights = load_file(ours / "model.safetensors")
    save_file({k: v * 2 for k, v in weights.items()}, ours / "model.safetensors")
    convert("--model", ours, "--base", theirs, "--out", tmp_path / "back")
    loaded = type(model).from_pretrained(tmp_path / "back", dtype=torch.bfloat16)
    for name, value in model.state_dict().items():
        factor = 2 if ".linear_attn." in name else 1
        assert torch.equal(loaded.state_dict()[name], value * factor), name


def test_readme_example(converted, readme_blocks, monkeypatch):
    _, model, _, ours = converted
    monkeypatch.chdir(ours.parent)
    ours.rename("layers")
    scope = {}
    exec(readme_blocks[1], scope)
    theirs = linear_attention(model, 0)
    assert torch.equal(scope["layer"].A_log, theirs.A_log.float())
