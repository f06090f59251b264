"""The decoding step of few operators against the model's forward, on the CPU as on a GPU."""

import copy

import pytest
import torch

from gated_deltanet import GatedDeltaNetCache
from gated_deltanet.models.gated_deltanet.decoding import DecodeStep, decode, why_not

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
EXACT = {"rtol": 1e-4, "atol": 1e-4}  # fp32 through the whole model, logits of size 1


def prefilled(model, ids):
    cache = GatedDeltaNetCache()
    with torch.no_grad():
        model(ids, past_key_values=cache)
    return cache


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("use_gate", [True, False])
def test_steps_equal_the_forward(tiny_model, device, use_gate):
    model = tiny_model(use_gate=use_gate, allow_neg_eigval=not use_gate).to(device)
    ids = torch.randint(61, (3, 12), device=device)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    step = DecodeStep(model, prefilled(model, ids[:, :9]))
    for t in range(9, 12):
        torch.testing.assert_close(step.forward(ids[:, t]), expected[:, t], **EXACT)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    again = DecodeStep(model, prefilled(model, ids[:, :9]))
    assert again.layers[0].in_proj.data_ptr() == step.layers[0].in_proj.data_ptr()


@pytest.mark.parametrize("device", DEVICES)
def test_a_cache_goes_on_in_the_forward(tiny_model, device):
    model = tiny_model().to(device)
    ids = torch.randint(61, (2, 14), device=device)
    cache = prefilled(model, ids[:, :9])
    DecodeStep(model, cache).forward(ids[:, 9])
    with torch.no_grad():
        following = model(ids[:, 10:], past_key_values=cache).logits
        expected = model(ids, use_cache=False).logits[:, 10:]
    torch.testing.assert_close(following, expected, **EXACT)


def test_a_saved_model_is_the_same(tiny_model, tmp_path):
    model = tiny_model()
    ids = torch.randint(61, (1, 5))
    DecodeStep(model, prefilled(model, ids))
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_refusals(tiny_model):
    assert why_not(tiny_model()) == ""
    hybrid = tiny_model(attn={"layers": [1], "num_heads": 4})
    assert why_not(hybrid) == "a layer is attention, whose cache grows"
    assert "short convolution" in why_not(tiny_model(use_short_conv=False))
    hooked = tiny_model()
    hooked.lm_head.register_forward_hook(lambda *_: None)
    assert why_not(hooked) == "a Linear has hooks"
    adapted = tiny_model()
    adapted.model.layers[0].mlp.up_proj = torch.nn.Sequential(adapted.model.layers[0].mlp.up_proj)
    adapted.model.layers[0].mlp.up_proj.base_layer = torch.nn.Identity()
    assert why_not(adapted) != ""
    with pytest.raises(ValueError, match="DecodeStep: a layer is attention"):
        DecodeStep(hybrid, prefilled(hybrid, torch.randint(61, (1, 5))))


def test_only_settled_caches_are_captured(tiny_model, monkeypatch):
    model, ids = tiny_model(), torch.randint(61, (2, 12))
    monkeypatch.setattr(DecodeStep, "replay", DecodeStep.forward)  # as without a GPU
    cache = prefilled(model, ids[:, :5])
    assert decode(model, ids[:, 5:6], cache) is None  # seen for the first time
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
    torch.testing.assert_close(decode(model, ids[:, 5:6], cache), expected[:, 5], **EXACT)
    torch.testing.assert_close(decode(model, ids[:, 6:7], cache), expected[:, 6], **EXACT)
    copied = copy.deepcopy(cache)
    assert copied.step is None
    cache.reorder_cache(torch.tensor([1, 0]))  # other tensors, as beam search makes
    assert decode(model, ids[:, 7:8], cache) is None
    torch.testing.assert_close(
        decode(model, ids.flip(0)[:, 7:8], cache), expected.flip(0)[:, 7], **EXACT
    )


@pytest.mark.skipif("cuda" not in DEVICES, reason="needs a GPU")
def test_generate_replays_a_graph(tiny_model):
    model, ids = tiny_model(), torch.randint(1, 61, (3, 5))  # 0 would be taken for padding
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 20}
    expected = model.generate(ids, **options)
    model.cuda()
    cache = GatedDeltaNetCache()
    generated = model.generate(ids.cuda(), past_key_values=cache, **options)
    assert torch.equal(generated.cpu(), expected)
    assert isinstance(cache.step, DecodeStep) and cache.step.graph is not None
    beams = model.generate(ids.cuda(), num_beams=3, **options).cpu()
    assert torch.equal(beams, model.cpu().generate(ids, num_beams=3, **options))
