"""transformers' own Gated DeltaNet models on our operators, beside its PyTorch path and fp64.

What is compared: logits, gradients, cached decoding, left padding, packed sequences.
"""

import copy

import pytest
import torch
from families import (
    FAMILIES,
    Family,
    assert_as_accurate,
    exact_copy,
    exact_path,
    tokens,
    torch_path,
)
from torch.utils._python_dispatch import TorchDispatchMode

from gated_deltanet.models import fuse_gated_norms

LENGTH = 70  # more than a chunk of 64


@pytest.fixture(params=FAMILIES, name="family")
def _family(request) -> Family:
    return FAMILIES[request.param]


class CalledOperators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "gdn":
            self.names.add(function._schema.name)
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def test_models_pick_up_our_operators(family):
    model = family.model()
    ids = tokens(1, 8)
    with CalledOperators() as called:
        cache = model(ids, use_cache=True).past_key_values
        model(ids[:, :1], past_key_values=cache)
    assert {"gdn::gated_delta_rule_forward", "gdn::causal_conv1d"} <= called.names
    with CalledOperators() as called, torch_path(family):
        model(ids)
    assert not called.names


def test_readme_example(readme_blocks):
    scope = {}
    with CalledOperators() as called:
        exec(readme_blocks[0], scope)
    assert "gdn::gated_delta_rule_forward" in called.names


def three_ways(family, model, compute):
    """compute(model) with us, on transformers' PyTorch path, and there in fp64."""
    ours = compute(model)
    with torch_path(family):
        theirs = compute(model)
    with exact_path(family):
        exact = compute(exact_copy(model))
    return ours, theirs, exact


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@torch.no_grad()
def test_logits(family, dtype):
    ids = tokens(2, LENGTH)
    model = family.model(dtype)
    assert_as_accurate(*three_ways(family, model, lambda m: m(ids, use_cache=False).logits))


def test_gradients(family):
    ids = tokens(2, LENGTH)

    def gradients(model):
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    ours, theirs, exact = three_ways(family, family.model().train(), gradients)
    assert ours.keys() == theirs.keys() == exact.keys()
    assert any("A_log" in name for name in ours)
    for name in exact:
        assert_as_accurate(ours[name], theirs[name], exact[name], name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_fused_gated_norms(family, dtype):
    ids = tokens(2, LENGTH)

    def run(model):
        logits = model(ids, use_cache=False).logits
        logits.float().square().mean().backward()
        layer = model.model.layers[0].linear_attn
        return logits.detach(), layer.A_log.grad

    model = family.model(dtype)
    exact_model, fused = exact_copy(model), copy.deepcopy(model)
    assert fuse_gated_norms(fused) == 3
    assert fused.state_dict().keys() == model.state_dict().keys()
    with CalledOperators() as called:
        ours = run(copy.deepcopy(fused))
    assert "gdn::norm" in called.names
    with torch_path(family):
        theirs = run(model)
    with exact_path(family):
        exact = run(exact_model)
    # In bf16 theirs has no digit of the gradient right, through four layers.
    names = ["logits", "A_log"] if dtype == torch.float32 else ["logits"]
    for name, *three in zip(names, ours, theirs, exact):
        assert_as_accurate(*three, name)


def test_only_their_norms_are_fused():
    with pytest.raises(ValueError, match=r"model must be .* got a Linear"):
        fuse_gated_norms(torch.nn.Linear(2, 2))


def decode(model, ids, steps):
    """Logits of a prefill and of further calls on its cache, [B, T, vocabulary]."""
    position = ids.shape[1] - sum(steps)
    out = model(ids[:, :position], use_cache=True)
    logits = [out.logits]
    for step in steps:
        out = model(ids[:, position : position + step], past_key_values=out.past_key_values)
        logits.append(out.logits)
        position += step
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("prefill", [LENGTH, 2], ids=["long", "shorter than the convolution"])
@torch.no_grad()
def test_cached_decoding(family, prefill):
    steps = [1, 1, 3, 1]  # single tokens, and several at once
    ids = tokens(2, prefill + sum(steps))
    model = family.model()
    ours = decode(model, ids, steps)
    with torch_path(family):
        theirs = decode(model, ids, steps)
    with exact_path(family):
        exact = exact_copy(model)(ids, use_cache=False).logits  # the full forward
    assert_as_accurate(ours, theirs, exact)


@torch.no_grad()
def test_left_padding(family):
    lengths = [LENGTH, 23]
    rows = [tokens(1, length, seed=length) for length in lengths]
    ids, mask = torch.zeros(2, LENGTH, dtype=torch.long), torch.zeros(2, LENGTH, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, LENGTH - length :], mask[row, LENGTH - length :] = rows[row][0], 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    model = family.model()

    def padded(model):
        logits = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        return torch.cat([logits[row, -length:] for row, length in enumerate(lengths)])

    ours = padded(model)
    with torch_path(family):
        theirs = padded(model)
    with exact_path(family):
        wide = exact_copy(model)
        exact = torch.cat([wide(row, use_cache=False).logits[0] for row in rows])
    assert_as_accurate(ours, theirs, exact)


def packed_inputs(lengths, with_seq_idx):
    bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    inputs = {
        "input_ids": tokens(1, sum(lengths)),
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
        "use_cache": False,
    }
    if with_seq_idx:
        numbers = torch.arange(len(lengths), dtype=torch.int32)
        inputs["seq_idx"] = numbers.repeat_interleave(torch.tensor(lengths))[None]
    return inputs


@pytest.mark.parametrize("with_seq_idx", [True, False], ids=["seq_idx", "only cu_seq_lens"])
def test_packed_sequences(family, with_seq_idx):
    lengths = [5, LENGTH, 1, 2, 30]
    inputs = packed_inputs(lengths, with_seq_idx)
    documents = inputs["input_ids"].split(lengths, dim=1)
    model = family.model().train()

    def run(model, calls):
        model.zero_grad()
        logits = torch.cat([model(**call).logits[0] for call in calls])
        logits.square().mean().backward()
        layer = model.model.layers[0].linear_attn
        return logits.detach(), layer.A_log.grad.clone(), layer.conv1d.weight.grad.clone()

    alone = [{"input_ids": document, "use_cache": False} for document in documents]
    ours = run(model, [inputs])
    with torch_path(family):
        theirs = run(model, alone)  # it refuses packed sequences
    with exact_path(family):
        exact = run(exact_copy(model), alone)
    for name, *three in zip(["logits", "A_log", "conv1d"], ours, theirs, exact):
        assert_as_accurate(*three, name)


@torch.no_grad()
def test_generation(family):
    """The same tokens as transformers' PyTorch path, from prompts of two lengths in a batch."""
    ids = tokens(2, 12)
    mask = torch.ones_like(ids)
    ids[1, :5] = mask[1, :5] = 0
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    model = family.model()
    ours = model.generate(ids, **options)
    with torch_path(family):
        theirs = model.generate(ids, **options)
    assert torch.equal(ours, theirs)
    sampled = model.generate(ids, attention_mask=mask, max_new_tokens=4, num_beams=2)
    assert sampled.shape == (2, 16)
