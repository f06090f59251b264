"""torch.library.opcheck on every operator: schema, autograd registration, fake tensors, AOT."""

import pytest
import torch

import gated_deltanet  # noqa: F401 (registers the operators)

gdn = torch.ops.gdn
B, T, H, HV, K, V = 2, 5, 2, 4, 8, 4


def rule_arguments(grad=True, dtype=torch.float32):
    q = torch.randn(B, T, H, K, dtype=dtype, requires_grad=grad)
    k = torch.randn(B, T, H, K, dtype=dtype, requires_grad=grad)
    v = torch.randn(B, T, HV, V, dtype=dtype, requires_grad=grad)
    g = (-torch.rand(B, T, HV)).requires_grad_(grad)
    beta = torch.rand(B, T, HV).requires_grad_(grad)
    return q, k, v, g, beta


def states(grad=False):
    return torch.randn(B, HV, K, V, requires_grad=grad)


def packed(arguments):
    return [x.detach().flatten(0, 1).unsqueeze(0).requires_grad_() for x in arguments]


def core(recurrent, **_):
    """The arguments of gated_delta_rule_forward after the tensors."""
    return (states(True), None, None, True, False, 64, recurrent, True, False)


CU_SEQLENS = torch.tensor([0, 4, B * T])


def rule_cases(name):
    op = getattr(gdn, name)
    return {
        f"{name}: plain": (op, rule_arguments(), {}),
        f"{name}: bf16": (op, rule_arguments(dtype=torch.bfloat16), {}),
        f"{name}: everything": (
            op,
            rule_arguments(),
            {
                "scale": 0.5,
                "initial_state": states(True),
                "output_final_state": True,
                "use_qk_l2norm_in_kernel": True,
                "use_beta_sigmoid_in_kernel": True,
                "allow_neg_eigval": True,
                "use_gate_in_kernel": True,
                "A_log": torch.randn(HV, requires_grad=True),
                "dt_bias": torch.randn(HV, requires_grad=True),
                "chunk_size": 16,
            },
        ),
        f"{name}: packed": (op, packed(rule_arguments()), {"cu_seqlens": CU_SEQLENS}),
    }


def other_cases():
    x = torch.randn(B, T, 6, requires_grad=True)
    taps, bias = torch.randn(6, 4, requires_grad=True), torch.randn(6, requires_grad=True)
    history = torch.randn(B, 6, 3)
    weight = torch.rand(6, requires_grad=True)
    logits = torch.randn(7, 11, requires_grad=True)
    target = torch.randint(11, (7,))
    hidden, head = torch.randn(7, 6, requires_grad=True), torch.randn(11, 6, requires_grad=True)
    q, k, v, g, beta = rule_arguments(grad=False)
    d_o, fresh = torch.randn(B, T, HV, V), rule_arguments(grad=False)
    gates = (torch.randn(B, T, HV, requires_grad=True), *torch.randn(2, HV).requires_grad_())
    tail = (None, None, True, False, 64)
    rows, rows_weight = torch.randn(2, 6), torch.randn(8, 6)
    return {
        "update": (gdn.fused_recurrent_gated_delta_rule_update, (q, k, v, g, beta, states()), {}),
        "core forward": (gdn.gated_delta_rule_forward, (*rule_arguments(), *core(False)), {}),
        "core recurrent": (gdn.gated_delta_rule_forward, (*rule_arguments(), *core(True)), {}),
        "core backward": (
            gdn.gated_delta_rule_backward,
            (d_o, None, *fresh, states(), None, *tail),
            {},
        ),
        "core update": (
            gdn.gated_delta_rule_update,
            (q, k, v, g, beta, states(), None, None, True, False),
            {},
        ),
        "step": (
            gdn.gated_delta_rule_step,
            (q, k, v, g, beta, states(), torch.randn(HV), torch.randn(HV)),
            {},
        ),
        "token states": (
            gdn.gated_delta_rule_token_states,
            (q, k, v, g, beta, states(), None, True, False),
            {},
        ),
        "states": (
            gdn.fused_recurrent_gated_delta_rule_states,
            (q, k, v, g, beta),
            {"state_v_first": True},
        ),
        "small_batch_linear": (
            gdn.small_batch_linear,
            (rows, rows_weight, torch.rand(3), 1e-5),
            {"gate": torch.randn(2, 6), "residual": torch.randn(2, 8)},
        ),
        "small_batch_linear, swiglu": (
            gdn.small_batch_linear,
            (rows, rows_weight),
            {"swiglu": True},
        ),
        "small_batch_linear, convolution": (
            gdn.small_batch_linear,
            (rows, rows_weight[:5]),
            {"conv_weight": torch.randn(4, 4), "conv_state": torch.randn(2, 4, 3)},
        ),
        "gate": (gdn.gated_delta_rule_gate, gates, {}),
        "gate backward": (
            gdn.gated_delta_rule_gate_backward,
            (torch.randn(B, T, HV), *(gate.detach() for gate in gates)),
            {},
        ),
        "conv": (gdn.causal_conv1d, (x, taps), {}),
        "conv, everything": (
            gdn.causal_conv1d,
            (x, taps, bias, "silu", history.clone().requires_grad_(), True),
            {},
        ),
        "conv backward": (
            gdn.causal_conv1d_backward,
            (torch.randn(B, T, 6), None, x.detach(), taps.detach(), None, "silu", None, None),
            {},
        ),
        "conv update": (gdn.causal_conv1d_update, (x.detach(), history, taps.detach()), {}),
        "rms_norm": (gdn.rms_norm, (x, weight, 1e-5), {}),
        "rms_norm_gated": (gdn.rms_norm_gated, (x, torch.randn_like(x), weight, 1e-5), {}),
        "add_rms_norm": (gdn.add_rms_norm, (x, torch.randn_like(x), weight, 1e-5), {}),
        "l2_norm": (gdn.l2_norm, (x,), {}),
        "norm": (gdn.norm, (x, None, weight, 1e-5, False), {}),
        "norm backward": (
            gdn.norm_backward,
            (torch.randn(B, T, 6), x.detach(), None, weight.detach(), None, 1e-5, False),
            {},
        ),
        "swiglu": (gdn.swiglu, (x, torch.randn_like(x, requires_grad=True)), {}),
        "linears": (
            gdn.linears,
            (x, [torch.randn(n, x.shape[-1], requires_grad=True) for n in (2, 70, 3)]),
            {},
        ),
        "swiglu linear": (
            gdn.swiglu_linear,
            (x, torch.randn_like(x, requires_grad=True), torch.randn(5, x.shape[-1])),
            {},
        ),
        "swiglu backward": (gdn.swiglu_backward, tuple(torch.randn(3, 4, 6)), {}),
        "cross_entropy": (gdn.cross_entropy, (logits, target), {}),
        "cross_entropy rows": (gdn.cross_entropy_rows, (logits, target, -100), {}),
        "cross_entropy rows backward": (
            gdn.cross_entropy_rows_backward,
            (torch.rand(7), logits.detach(), target, logits.detach().logsumexp(1), -100),
            {},
        ),
        "linear_cross_entropy": (gdn.linear_cross_entropy, (hidden, head, target), {}),
        "linear_cross_entropy, none": (
            gdn.linear_cross_entropy,
            (hidden, head, target),
            {"reduction": "none", "rows_per_block": 3},
        ),
        "linear_cross_entropy rows": (
            gdn.linear_cross_entropy_rows,
            (hidden.detach(), head.detach(), target, -100, 3),
            {},
        ),
        "linear_cross_entropy gradients": (
            gdn.linear_cross_entropy_gradients,
            (torch.rand(7), hidden.detach(), head.detach(), target, -100, 3),
            {},
        ),
    }


def cases():
    torch.manual_seed(0)
    return {
        **rule_cases("chunk_gated_delta_rule"),
        **rule_cases("fused_recurrent_gated_delta_rule"),
        **other_cases(),
    }


CASES = cases()


@pytest.mark.parametrize("name", CASES)
def test_opcheck(name):
    op, arguments, options = CASES[name]
    torch.library.opcheck(op.default, arguments, options)


def test_every_operator_is_checked():
    names = torch._C._dispatch_get_all_op_names()
    registered = {name for name in names if name.startswith("gdn::")}
    checked = {op._qualified_op_name for op, _, _ in CASES.values()}
    assert registered == checked
