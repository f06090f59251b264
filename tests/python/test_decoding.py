"""The decoding step of few operators against the model's forward, on the CPU as on a GPU."""

import copy

import peft
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


@pytest.fixture
def steps(monkeypatch):
    """The rows of every step that is taken."""
    taken, forward = [], DecodeStep.forward

    def counted(step, tokens):
        taken.append(len(tokens))
        return forward(step, tokens)

    monkeypatch.setattr(DecodeStep, "forward", counted)
    return taken


def ordinary(model, ids, **options):
    """Logits of the last token without a cache."""
    with torch.no_grad():
        return model(ids, use_cache=False, **options).logits[:, -1]


def token(model, ids, cache, **options):
    """Logits of the last token with a cache of those before."""
    with torch.no_grad():
        return model(ids[:, -1:], past_key_values=cache, **options).logits[:, -1]


@pytest.mark.parametrize("beams", [1, 3])
def test_generate_takes_steps(tiny_model, steps, beams):
    model, ids = tiny_model(), torch.randint(1, 61, (3, 5))
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 20}
    options["num_beams"] = beams
    generated = model.generate(ids, **options)
    assert steps == [3 * beams] * 19  # the prompt gives the first token
    assert torch.equal(generated, model.generate(ids, use_cache=False, **options))
    assert len(steps) == 19
    model.generate(ids.repeat(6, 1), **{**options, "num_beams": 1})
    assert len(steps) == 19  # the operators would compose so many rows


def test_16_bits_are_as_near_as_the_forward(tiny_model, steps):
    model, ids = tiny_model().bfloat16(), torch.randint(61, (3, 12))
    wide = copy.deepcopy(model).float()  # of the same numbers
    cache, errors = prefilled(model, ids[:, :9]), []
    for t in range(9, 12):
        expected = ordinary(wide, ids[:, : t + 1])
        ours, theirs = token(model, ids[:, : t + 1], cache), ordinary(model, ids[:, : t + 1])
        errors.append([(logits - expected).norm() for logits in (ours, theirs)])
    ours, theirs = torch.tensor(errors).norm(dim=0)
    assert ours <= 2 * theirs and steps == [3, 3, 3]


def test_padded_rows(tiny_model, steps):
    model, ids = tiny_model(), torch.randint(61, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    cache = GatedDeltaNetCache()
    with torch.no_grad():
        model(ids[:, :7], attention_mask=mask[:, :7], past_key_values=cache)
    for t in (8, 9):
        logits = token(model, ids[:, :t], cache, attention_mask=mask[:, :t])
        torch.testing.assert_close(logits[:1], ordinary(model, ids[:1, 3:t]), **EXACT)
        torch.testing.assert_close(logits[1:], ordinary(model, ids[1:, :t]), **EXACT)
    assert steps == [2, 2]
    # A row without a token keeps its state, for which there is no step.
    paused = torch.tensor([[0], [1]])
    state = cache.layers[0].recurrent_state[0].clone()
    token(model, ids, cache, attention_mask=paused)
    assert len(steps) == 2 and torch.equal(cache.layers[0].recurrent_state[0], state)


class Doubled(torch.nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def double_by_hook(model):
    model.model.layers[1].attn.o_proj.register_forward_hook(lambda _1, _2, output: 2 * output)


def double_input_by_hook(model):
    model.model.layers[0].mlp.register_forward_pre_hook(lambda _, inputs: (2 * inputs[0],))


def double_by_another_module(model):
    linear = model.model.layers[0].attn.k_proj
    other = Doubled(linear.in_features, linear.out_features, bias=False)
    other.weight = linear.weight
    model.model.layers[0].attn.k_proj = other


def double_by_another_forward(model):
    norm = model.model.layers[0].attn_norm
    forward = norm.forward
    norm.forward = lambda *inputs, **options: tuple(
        2 * y for y in forward(*inputs, **{**options, "prenorm": True})
    )


def double_by_a_parametrization(model):
    class Twice(torch.nn.Module):
        def forward(self, weight):
            return 2 * weight

    linear = model.model.layers[0].mlp.down_proj
    torch.nn.utils.parametrize.register_parametrization(linear, "weight", Twice())


def add_a_bias(model):
    linear = model.model.layers[0].mlp.up_proj
    linear.bias = torch.nn.Parameter(torch.ones(linear.out_features))


def repeat_a_row(model):
    linear = model.model.layers[0].attn.q_proj
    row = linear.weight.detach()[:1]  # of the same memory
    linear.weight = torch.nn.Parameter(row.expand_as(linear.weight))


def adapt(model):
    config = peft.LoraConfig(target_modules=["v_proj", "up_proj"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, model)


def replace_a_weight(model):
    linear = model.model.layers[0].attn.q_proj
    linear.weight = torch.nn.Parameter(torch.randn_like(linear.weight))


def replace_the_memory_of_a_weight(model):
    weight = model.model.layers[1].mlp.gate_proj.weight
    weight.data = torch.randn_like(weight)


def change_a_weight(model):
    with torch.no_grad():
        model.model.layers[1].attn.v_conv1d.weight.normal_()


CHANGES = {
    change: stays_plain
    for stays_plain, changes in {
        False: [double_by_hook, double_input_by_hook, double_by_another_module, add_a_bias,
                double_by_another_forward, double_by_a_parametrization, repeat_a_row, adapt],
        True: [replace_a_weight, replace_the_memory_of_a_weight, change_a_weight],
    }.items()
    for change in changes
}  # fmt: skip


@pytest.mark.parametrize("when", ["before", "after the first step"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_nothing_is_passed_over(tiny_model, steps, change, when):
    """Whatever a module is made to do, before a cache's step or between two, is done."""
    model, ids = tiny_model(), torch.randint(61, (2, 12))
    plain = copy.deepcopy(model)
    if when == "before":
        change(model)
    cache = prefilled(model, ids[:, :10])
    expected_cache = copy.deepcopy(cache)
    token(model, ids[:, :11], cache)
    if when != "before":
        assert steps == [2]
        change(model)
    expected = expected_cache
    expected.step = "no step"
    token(model if when == "before" else plain, ids[:, :11], expected)
    count = len(steps)
    torch.testing.assert_close(token(model, ids, cache), token(model, ids, expected), **EXACT)
    assert (len(steps) > count) == CHANGES[change]
    assert not torch.allclose(token(plain, ids, copy.deepcopy(expected)),
                              token(model, ids, copy.deepcopy(expected)), **EXACT)  # fmt: skip


def test_training_goes_on_after_inference_mode(tiny_model, steps):
    model, ids = tiny_model(), torch.randint(61, (1, 6))
    with torch.inference_mode():
        token(model, ids, prefilled(model, ids[:, :5]))
    assert steps == [1]
    model.train()(ids, labels=ids).loss.backward()


def test_steps_reject_what_the_forward_rejects(tiny_model):
    model, ids = tiny_model(), torch.randint(61, (2, 6))
    cache = prefilled(model, ids[:, :5])
    token(model, ids, cache)
    with pytest.raises(ValueError, match="input_ids must be from 0 to"):
        token(model, torch.full((2, 1), 61), cache)
    with pytest.raises(ValueError, match="past_key_values must be"):
        token(model, ids[:1], cache)
    with pytest.raises(ValueError, match="attention_mask must be of shape"):
        token(model, ids, cache, attention_mask=torch.ones(3, 6))


def test_other_dtypes_take_the_forward(tiny_model, steps):
    ids = torch.randint(61, (1, 6))
    for model in (tiny_model().double(), tiny_model().double().bfloat16()):  # wide gates
        token(model, ids, prefilled(model, ids[:, :5]))
    model = tiny_model()
    with torch.autocast("cpu", torch.bfloat16):
        token(model, ids, prefilled(model, ids[:, :5]))
    assert steps == []


def test_compiled_models_take_no_steps(tiny_model, steps):
    torch.compiler.reset()
    model, ids = tiny_model(), torch.randint(61, (2, 8))
    compiled = torch.compile(model, backend="eager")
    cache = prefilled(model, ids[:, :5])
    token(model, ids[:, :6], cache)
    for t in (7, 8):  # from a cache that a step has updated
        logits = token(compiled, ids[:, :t], cache)
        torch.testing.assert_close(logits, ordinary(model, ids[:, :t]), **EXACT)
    assert steps == [2]


@pytest.mark.skipif("cuda" not in DEVICES, reason="needs a GPU")
def test_only_settled_caches_are_captured(tiny_model):
    model, ids = tiny_model().cuda(), torch.randint(61, (2, 12)).cuda()
    cache = prefilled(model, ids[:, :5])
    assert decode(model, ids[:, 5:6], cache) is None  # seen for the first time
    expected = torch.stack([ordinary(model, ids[:, :t]) for t in range(6, 9)], 1)
    torch.testing.assert_close(decode(model, ids[:, 5:6], cache), expected[:, 0], **EXACT)
    torch.testing.assert_close(decode(model, ids[:, 6:7], cache), expected[:, 1], **EXACT)
    copied = copy.deepcopy(cache)
    assert copied.step is None
    cache.reorder_cache(torch.tensor([1, 0]))  # other tensors, as beam search makes
    assert decode(model, ids.flip(0)[:, 7:8], cache) is None
    torch.testing.assert_close(
        decode(model, ids.flip(0)[:, 7:8], cache), expected.flip(0)[:, 2], **EXACT
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
