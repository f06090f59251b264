#!/usr/bin/env python3
"""Norms, short convolution, SwiGLU, cross-entropy and the gate on the CPU, beside plain torch.

Checks our results first, then times both in turns within one run, and prints medians, spread and
ratios, of the forward and of forward + backward.
"""

import argparse
import sys

import torch
import torch.nn.functional as F
from support.timing import print_header, report


def make_cases(rows, columns, dtype):
    """(name, our operator, plain torch, differentiable inputs) of each operator."""
    gdn = torch.ops.gdn
    torch.manual_seed(0)

    def leaf(*shape):
        return torch.randn(*shape).to(dtype).requires_grad_()

    def plain_norm(x, weight):
        wide = x.float() if dtype != torch.float64 else x
        return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5) * weight

    def plain_convolution(x, weight):
        width, tokens = weight.shape[1], x.shape[1]
        y = F.conv1d(
            x.transpose(1, 2), weight.unsqueeze(1), padding=width - 1, groups=weight.shape[0]
        )
        return F.silu(y[..., :tokens]).transpose(1, 2)

    heads = rows * columns // 128
    target = torch.randint(0, 8192, (rows // 4,))
    x, gate, weight = leaf(rows, columns), leaf(rows, columns), leaf(columns)
    small, small_gate, small_weight = leaf(heads, 128), leaf(heads, 128), leaf(128)
    a, a_log, dt_bias = leaf(rows, 16), torch.randn(16), torch.randn(16)
    logits = leaf(rows // 4, 8192)
    return [
        (
            "rms_norm",
            lambda: gdn.rms_norm(x, weight, 1e-5),
            lambda: plain_norm(x, weight).to(dtype),
            [x, weight],
        ),
        (
            "rms_norm against F.rms_norm",
            lambda: gdn.rms_norm(x, weight, 1e-5),
            lambda: F.rms_norm(x, (columns,), weight, 1e-5),
            [x, weight],
        ),
        (
            "rms_norm_gated, heads of 128",
            lambda: gdn.rms_norm_gated(small, small_gate, small_weight, 1e-5),
            lambda: (plain_norm(small, small_weight) * F.silu(small_gate.float())).to(dtype),
            [small, small_gate, small_weight],
        ),
        (
            "l2_norm, heads of 128",
            lambda: gdn.l2_norm(small),
            lambda: small * torch.rsqrt(small.square().sum(-1, keepdim=True) + 1e-6),
            [small],
        ),
        ("swiglu", lambda: gdn.swiglu(x, gate), lambda: F.silu(x) * gate, [x, gate]),
        *convolution_case(gdn, plain_convolution, leaf(4, rows // 4, columns), leaf(columns, 4)),
        (
            "gate, 16 heads",
            lambda: gdn.gated_delta_rule_gate(a, a_log, dt_bias),
            lambda: -a_log.exp() * F.softplus(a.float() + dt_bias),
            [a],
        ),
        (
            f"cross_entropy [{rows // 4}, 8192]",
            lambda: gdn.cross_entropy(logits, target),
            lambda: F.cross_entropy(logits.float(), target),
            [logits],
        ),
    ]


def convolution_case(gdn, plain, x, weight):
    yield (
        "causal_conv1d, silu, 4 taps",
        lambda: gdn.causal_conv1d(x, weight, None, "silu")[0],
        lambda: plain(x, weight),
        [x, weight],
    )


def forward_and_backward(function, inputs):
    y = function()
    return [y.detach(), *torch.autograd.grad(y, inputs, torch.ones_like(y))]


def check(name, ours, plain, inputs, dtype):
    """Stops where we and plain torch differ by more than the dtype's roundings explain."""
    tolerance = 64 * torch.finfo(dtype).eps
    for got, want in zip(forward_and_backward(ours, inputs), forward_and_backward(plain, inputs)):
        error = ((got.double() - want.double()).norm() / want.double().norm()).item()
        if not error <= tolerance:
            sys.exit(f"wrong result: {name}: relative difference {error:.1e}")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--library", default="build/release/lib/libgdn_ops.so")
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--columns", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.ops.load_library(args.library)
    print(f"[{args.rows}, {args.columns}], {args.threads} threads, torch {torch.__version__}")
    print_header("plain torch")
    for dtype in (torch.float32, torch.bfloat16):
        label = str(dtype).removeprefix("torch.")
        for name, ours, plain, inputs in make_cases(args.rows, args.columns, dtype):
            check(name, ours, plain, inputs, dtype)
            with torch.no_grad():
                report(f"{label} {name}: forward", [ours, plain], args.repeats)
            report(
                f"{label} {name}: forward + backward",
                [
                    lambda: forward_and_backward(ours, inputs),
                    lambda: forward_and_backward(plain, inputs),
                ],
                args.repeats,
            )


if __name__ == "__main__":
    main()
