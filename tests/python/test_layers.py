"""The layers: contract, padding, packing, caches, precision, errors."""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gated_deltanet.layers import Attention, GatedDeltaNet, LayerCache
from gated_deltanet.models import GatedDeltaNetCache
from gated_deltanet.modules import RotaryEmbedding

VARIANTS = {
    "default": {},
    "no gate": {"use_gate": False},
    "no convolution": {"use_short_conv": False},
    "negative": {"allow_neg_eigval": True, "conv_bias": True},
    "recurrent": {"mode": "fused_recurrent", "conv_size": 2},
}
# Sums of 32 terms in fp32, in another order.
EXACT = {"rtol": 1e-5, "atol": 1e-5}


def gated(**options):
    return GatedDeltaNet(
        hidden_size=32, expand_v=1.5, head_dim=8, num_heads=2, num_v_heads=4, layer_idx=0, **options
    ).eval()


def attention(**options):
    return Attention(hidden_size=32, num_heads=4, layer_idx=0, **options).eval()


LAYERS = {
    **{name: (gated, options) for name, options in VARIANTS.items()},
    "attention": (attention, {"num_kv_heads": 2, "qk_norm": True}),
    "window": (attention, {"window_size": 7, "qkv_bias": True}),
}


@pytest.fixture(params=LAYERS)
def layer(request):
    make, options = LAYERS[request.param]
    return make(**options)


def test_contract():
    layer = GatedDeltaNet(hidden_size=32, expand_v=2.0, head_dim=8, num_heads=2, conv_bias=True)
    output, attentions, cache = layer(torch.randn(2, 9, 32))
    assert output.shape == (2, 9, 32) and attentions is None and cache is None
    shapes = {name: list(value.shape) for name, value in layer.state_dict().items()}
    convolutions = {f"{x}_conv1d.weight": [16 * n, 1, 4] for x, n in (("q", 1), ("k", 1), ("v", 2))}
    biases = {f"{x}_conv1d.bias": [16 * n] for x, n in (("q", 1), ("k", 1), ("v", 2))}
    assert shapes == {
        "A_log": [2],
        "dt_bias": [2],
        "q_proj.weight": [16, 32],
        "k_proj.weight": [16, 32],
        "v_proj.weight": [32, 32],
        "a_proj.weight": [2, 32],
        "b_proj.weight": [2, 32],
        "g_proj.weight": [32, 32],
        "o_proj.weight": [32, 32],
        "o_norm.weight": [16],
        **convolutions,
        **biases,
    }
    assert layer.A_log._no_weight_decay and layer.dt_bias._no_weight_decay


def test_initial_gates():
    layer = GatedDeltaNet(hidden_size=8, head_dim=8, num_heads=2000)
    decay, step = layer.A_log.exp(), torch.nn.functional.softplus(layer.dt_bias)
    assert decay.min() >= 0 and decay.max() <= 16 and abs(decay.mean() - 8) < 0.5
    assert step.min() > 0.99e-3 and step.max() < 1.01e-1
    assert abs(step.log10().mean() + 2) < 0.05  # log-uniform between 10^-3 and 10^-1


def test_gate_parameters_stay_wide():
    layer = gated()
    precise = layer.A_log.detach().clone()
    for cast in (layer.bfloat16, layer.half, lambda: layer.to(torch.bfloat16)):
        cast()
        assert layer.q_proj.weight.dtype in (torch.bfloat16, torch.float16)
        assert layer.A_log.dtype == layer.dt_bias.dtype == torch.float32
        assert torch.equal(layer.A_log, precise)
    assert layer.double().A_log.dtype == torch.float64
    assert layer.to("meta").A_log.is_meta


def test_left_padded_packed_and_single_agree(layer):
    lengths, T = (3, 11, 1, 0), 11
    rows = [torch.randn(1, length, 32) for length in lengths]
    single = [layer(row)[0] for row in rows]
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)])
    packed = layer(torch.cat(rows, 1), cu_seqlens=cu_seqlens)[0]
    torch.testing.assert_close(packed, torch.cat(single, 1), **EXACT)

    padded = torch.full((4, T, 32), 7.0)
    mask = torch.zeros(4, T, dtype=torch.int64)
    for i, row in enumerate(rows):
        padded[i, T - row.shape[1] :] = row
        mask[i, T - row.shape[1] :] = 1
    output = layer(padded, attention_mask=mask)[0]
    for i, expected in enumerate(single):
        torch.testing.assert_close(output[i : i + 1, T - lengths[i] :], expected, **EXACT)
    assert not output[mask == 0].any()


@pytest.mark.parametrize("gradients", [False, True])
def test_cached_steps_equal_the_full_forward(layer, gradients):
    x = torch.randn(2, 90, 32)
    full = layer(x)[0]
    cache, outputs = LayerCache(), []
    with torch.set_grad_enabled(gradients):
        for begin, end in ((0, 70), (70, 71), (71, 72), (72, 80), (80, 90)):
            outputs.append(layer(x[:, begin:end], past_key_values=cache)[0])
    torch.testing.assert_close(torch.cat(outputs, 1), full, **EXACT)
    assert cache.batch_size == 2 and cache.nbytes() > 0


def test_padded_rows_continue_from_a_cache(layer):
    first, more = [torch.randn(1, n, 32) for n in (2, 5)], torch.randn(2, 3, 32)
    single = [layer(torch.cat([x, more[i : i + 1]], 1))[0] for i, x in enumerate(first)]
    padded = torch.zeros(2, 5, 32)
    padded[0, 3:], padded[1] = first[0], first[1]
    mask = torch.tensor([[0, 0, 0, 1, 1], [1, 1, 1, 1, 1]])
    cache = GatedDeltaNetCache()
    layer(padded, attention_mask=mask, past_key_values=cache, use_cache=True)
    whole_mask = torch.cat([mask, torch.ones(2, 3, dtype=mask.dtype)], 1)
    output = layer(more, attention_mask=whole_mask, past_key_values=cache, use_cache=True)[0]
    expected = torch.cat([row[:, -3:] for row in single])
    torch.testing.assert_close(output, expected, **EXACT)


def test_gradients_of_padded_rows_equal_those_of_single_ones(layer):
    x = torch.randn(1, 6, 32)
    layer(x)[0].square().sum().backward()
    expected = {name: p.grad.clone() for name, p in layer.named_parameters()}
    layer.zero_grad()
    padded = torch.cat([torch.full((1, 4, 32), 3.0), x], 1)
    mask = torch.tensor([[0] * 4 + [1] * 6])
    layer(padded, attention_mask=mask)[0].square().sum().backward()
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], **EXACT, msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_casts_stay_near_fp32(layer, dtype):
    x = torch.randn(2, 20, 32)
    exact = layer(x)[0]
    with torch.autocast("cpu", dtype):
        automatic = layer(x)[0]
    assert automatic.dtype == dtype
    cast = layer.to(dtype)(x.to(dtype))[0]
    # Rounding of weights and of a dozen intermediate results, of the output's size: a few epsilon.
    bound = 12 * torch.finfo(dtype).eps * exact.abs().max()
    assert (automatic.float() - exact).abs().max() < bound
    assert (cast.float() - exact).abs().max() < bound


def test_cache_of_rows():
    layer, cache = gated(), LayerCache()
    layer(torch.randn(3, 5, 32), past_key_values=cache)
    before = {name: tensor.clone() for name, tensor in cache.tensors().items()}
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([5, 0]))
    for name, tensor in cache.tensors().items():
        assert torch.equal(tensor, before[name][[2, 0]])
    cache.crop(0)
    with pytest.raises(ValueError, match="tokens_to_remove must be 0"):
        cache.crop(-1)
    cache.reset()
    assert cache.tensors() == {} and cache.batch_size == -1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_v_heads": 3}, "num_v_heads must be a multiple of num_heads = 2, got 3"),
        ({"expand_v": 1.3}, "expand_v must be such that head_dim \\* expand_v is a whole number"),
        ({"mode": "parallel"}, 'mode must be "chunk" or "fused_recurrent", got "parallel"'),
        ({"head_dim": 0}, "head_dim must be positive, got 0"),
        ({"conv_size": 9}, "conv_size must be from 2 to 8, got 9"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=f"GatedDeltaNet: {message}"):
        GatedDeltaNet(**{"hidden_size": 32, "head_dim": 8, "num_heads": 2, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 5}, "num_heads must be a divisor of hidden_size = 32, got 5"),
        ({"num_kv_heads": 3}, "num_kv_heads must be a divisor of num_heads = 4, got 3"),
        ({"window_size": 0}, "window_size must be positive or None, got 0"),
    ],
)
def test_bad_attention_options(options, message):
    with pytest.raises(ValueError, match=f"Attention: {message}"):
        Attention(**{"hidden_size": 32, "num_heads": 4, **options})


def three_layers_of_cache():
    other = LayerCache()
    gated()(torch.randn(3, 4, 32), past_key_values=other)
    attention()(torch.randn(3, 4, 32), past_key_values=other)
    return other


@pytest.mark.parametrize("make", [gated, attention])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention_mask": torch.ones(2, 6, 6)}, r"attention_mask must be of shape \[B, T\]"),
        ({"attention_mask": torch.ones(2, 3)}, r"attention_mask must be of shape \[B, T\]"),
        (
            {"attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0]] * 2)},
            "attention_mask must be 0 for padding on the left, then 1",
        ),
        ({"output_attentions": True}, "output_attentions must be False"),
        ({"use_cache": True}, "past_key_values must be a LayerCache or a model's cache"),
        ({"past_key_values": [1]}, "past_key_values must be a GatedDeltaNetCache.* got list"),
        (
            {"cu_seqlens": torch.tensor([0, 6]), "attention_mask": torch.ones(2, 6)},
            "attention_mask must be None with cu_seqlens",
        ),
    ],
)
def test_bad_calls(make, options, message):
    with pytest.raises(ValueError, match=message):
        make()(torch.randn(2, 6, 32), **options)


@pytest.mark.parametrize("make", [gated, attention])
def test_cache_of_another_batch(make):
    with pytest.raises(ValueError, match="past_key_values must be that of this layer and batch"):
        make()(torch.randn(2, 1, 32), past_key_values=three_layers_of_cache())


@pytest.mark.parametrize("cu_seqlens", [[0, 4, 2, 6], [0, 3, 5], [1, 6], [0, 7], [0]], ids=str)
@pytest.mark.parametrize("make", [gated, attention])
def test_bad_boundaries(make, cu_seqlens):
    with pytest.raises(ValueError, match="cu_seqlens must"):
        make()(torch.randn(1, 6, 32), cu_seqlens=torch.tensor(cu_seqlens))


def test_boundaries_of_several_rows():
    for make in (gated, attention):
        with pytest.raises(ValueError, match="cu_seqlens must be None for a batch"):
            make()(torch.randn(2, 6, 32), cu_seqlens=torch.tensor([0, 6]))


def test_wrong_dtype_of_input(layer):
    with pytest.raises(ValueError, match=r"hidden_states must be torch.float32 like the weights"):
        layer(torch.randn(1, 6, 32, dtype=torch.float64))


def test_wrong_device_of_input(layer):
    with pytest.raises(ValueError, match="hidden_states must be on cpu like the weights"):
        layer(torch.randn(1, 6, 32, device="meta"))


def test_unknown_argument():
    with pytest.raises(TypeError, match="head_first"):
        gated()(torch.randn(1, 6, 32), head_first=True)
    with pytest.raises(TypeError, match="fuse"):
        gated(fuse=True)


def test_rotation_by_far_positions():
    """Only distances count, also ten million tokens in, where fp32 cannot tell neighbours."""
    rotary, far = RotaryEmbedding(8), 10_000_001
    angles = rotary.angles(torch.tensor([[far, far + 1, 1]]))[0]
    torch.testing.assert_close(angles[1] - angles[0], angles[2], rtol=0, atol=1e-8)


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_recomputing_keeps_less_and_gives_the_same_bits(options):
    def results(recompute):
        torch.manual_seed(0)
        layer = gated(**options).train()
        layer.recompute = recompute
        x = torch.randn(2, 30, 32, requires_grad=True)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: (kept.append(tensor.nbytes), tensor)[1], lambda tensor: tensor
        ):
            output = layer(x)[0]
        bytes_kept = sum(kept)
        output.square().sum().backward()
        return bytes_kept, [output, x.grad, *(p.grad for p in layer.parameters())]

    kept, recomputed = results(True)
    kept_before, plain = results(False)
    assert kept < 0.8 * kept_before
    for got, want in zip(recomputed, plain, strict=True):
        assert torch.equal(got, want)


def test_recomputing_keeps_no_input_of_o_proj_and_multiplies_no_more_than_without():
    class Products(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += function is torch.ops.aten.mm.default
            return function(*args, **(kwargs or {}))

    counts = []
    for recompute in (True, False):
        layer = gated().train()
        layer.recompute = recompute
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, kept=kept: (kept.append(tensor.shape), tensor)[1], lambda tensor: tensor
        ):
            output = layer(torch.randn(2, 30, 32))[0]
        # The projections are kept with both dimensions; a product takes [B T, ...].
        assert (torch.Size([60, layer.o_proj.in_features]) in kept) != recompute
        with Products() as products:
            output.sum().backward()
        counts.append(products.count)
    assert counts[0] == counts[1]
