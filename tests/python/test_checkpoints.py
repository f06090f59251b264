"""Checkpoints travel between the command gdn and Python, and both compute the same."""

import json
import subprocess
from pathlib import Path

import pytest
import torch

from gated_deltanet import GatedDeltaNetConfig, GatedDeltaNetForCausalLM

BOS = EOS = 256  # of the byte tokenizer
TEXTS = ("The state keeps what the gate lets it keep. " * 5, "delta rule", "# a line\n" * 20)
KINDS = {
    "plain": {},
    "hybrid": {"attn": {"layers": [1], "num_heads": 4, "num_kv_heads": 2, "window_size": 20}},
    "variant": {
        "num_v_heads": 4,
        "allow_neg_eigval": True,
        "use_gate": False,
        "tie_word_embeddings": True,
        "expand_v": 1.5,
        "conv_size": 3,
    },
}


def run(command, *arguments):
    line = [str(command), *map(str, arguments)]
    result = subprocess.run(line, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for i, text in enumerate(TEXTS):
        (folder / f"{i}.txt").write_text(text)
    return folder


def config(**options):
    return GatedDeltaNetConfig(
        hidden_size=32, num_hidden_layers=2, num_heads=2, head_dim=8, vocab_size=257,
        bos_token_id=BOS, eos_token_id=EOS, initializer_range=0.1, **options
    )  # fmt: skip


@torch.no_grad()
def assert_same_results(command, folder: Path, texts: Path):
    """The loss over the texts, and the likeliest continuation of a prompt, of both worlds."""
    model = GatedDeltaNetForCausalLM.from_pretrained(folder)
    total, count = 0.0, 0
    for text in TEXTS:
        ids = torch.tensor([[BOS, *text.encode(), EOS]])
        total += float(model(ids, labels=ids).loss.double()) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    evaluation = run(command, "eval", "--model", folder, "--tokenizer", "byte", "--threads", 1,
                     "--data", texts, "--json")  # fmt: skip
    theirs = json.loads(evaluation)
    assert theirs["tokens"] == count
    assert abs(theirs["loss"] - total / count) < 2e-6 * theirs["loss"]

    prompt = torch.tensor([[BOS, *b"The st"]])
    ours = model.generate(prompt, max_new_tokens=40, do_sample=False, eos_token_id=EOS)[0, 7:]
    text = bytes(token for token in ours.tolist() if token < 256)
    generated = run(command, "generate", "--model", folder, "--tokenizer", "byte", "--threads", 1,
                    "--prompt", "The st", "--max-new-tokens", 40, "--temperature", 0,
                    "--json")  # fmt: skip
    assert json.loads(generated)["text"] == text.decode(errors="replace")


@pytest.mark.parametrize("kind", KINDS)
def test_trained_by_the_command(command, kind, texts, tmp_path):
    config(**KINDS[kind]).save_pretrained(tmp_path)
    out = tmp_path / "run"
    run(command, "train", "--config", tmp_path / "config.json", "--data", texts, "--out", out,
        "--steps", 20, "--warmup", 2, "--batch-size", 2, "--seq-len", 64, "--lr", 1e-2,
        "--eval-every", 0, "--threads", 1)  # fmt: skip
    assert_same_results(command, out, texts)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shards", [False, True])
def test_saved_by_python(command, kind, shards, texts, tmp_path):
    model = GatedDeltaNetForCausalLM(config(**KINDS[kind]))
    model.save_pretrained(tmp_path / "model", max_shard_size="30KB" if shards else "1GB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1 or not shards
    assert_same_results(command, tmp_path / "model", texts)


def test_narrow_checkpoint(command, texts, tmp_path):
    """bf16 weights with fp32 gates, as Python writes them and both read them."""
    GatedDeltaNetForCausalLM(config()).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    evaluation = run(command, "eval", "--model", tmp_path / "model", "--tokenizer", "byte",
                     "--data", texts, "--json")  # fmt: skip
    model = GatedDeltaNetForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    losses = []
    for text in TEXTS:
        ids = torch.tensor([[BOS, *text.encode(), EOS]])
        losses.append(model(ids, labels=ids).loss.item() * (ids.shape[1] - 1))
    expected = sum(losses) / json.loads(evaluation)["tokens"]
    assert abs(json.loads(evaluation)["loss"] - expected) < 2e-6 * expected
