"""What the tests of the Python package share."""

import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here needs a network
torch.set_num_threads(1)  # shapes are too small to share


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def command():
    """The command gdn, which CTest names."""
    path = Path(os.environ.get("GDN_COMMAND", ROOT / "build/release/bin/gdn"))
    if not path.is_file():
        pytest.fail(f"{path}: no such program; GDN_COMMAND names the command gdn")
    return path


@pytest.fixture
def tiny_config():
    """Makes the configuration of a tiny model; options replace its fields."""
    from gated_deltanet import GatedDeltaNetConfig

    def make(**options):
        sizes = {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_heads": 2,
            "num_v_heads": 4,
            "head_dim": 8,
            "intermediate_size": 48,
            "vocab_size": 61,
            "initializer_range": 0.2,  # logits far enough apart for greedy comparisons
        }
        return GatedDeltaNetConfig(**{**sizes, **options})

    return make


@pytest.fixture
def tiny_model(tiny_config):
    """Makes a tiny model in evaluation; options replace its configuration's fields."""
    from gated_deltanet import GatedDeltaNetForCausalLM

    def make(**options):
        return GatedDeltaNetForCausalLM(tiny_config(**options)).eval()

    return make


HYBRID = {"attn": {"layers": [1], "num_heads": 4, "num_kv_heads": 2, "qk_norm": True}}
WINDOW = {"attn": {"layers": [1], "num_heads": 4, "window_size": 5, "qkv_bias": True}}
KINDS = {"plain": {}, "hybrid": HYBRID, "window": WINDOW}


@pytest.fixture(params=KINDS)
def kind(request):
    """Options of a plain model, and of hybrids with full and with windowed attention."""
    return KINDS[request.param]
