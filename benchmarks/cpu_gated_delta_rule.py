#!/usr/bin/env python3
"""The gated delta rule on the CPU, beside the PyTorch code that transformers falls back to.

Checks our results first, then times both in turns within one run, and prints medians, spread and
ratios; then the forward beside onnxruntime and mlx-lm, where they are installed. Shape: B 1,
T 2048, H/HV 16/32, K = V = 128 unless given.
"""

import argparse
import os
import platform
import sys

import torch
from support import cpu_peers
from support.timing import print_header, report


def load(library):
    """Our operators, and transformers' PyTorch code: for a chunk, and token by token."""
    os.environ["GDN_OPS_LIBRARY"] = os.path.abspath(library)  # for transformers, where it finds us
    torch.ops.load_library(os.environ["GDN_OPS_LIBRARY"])
    from transformers.models.qwen3_next import modeling_qwen3_next as modeling

    # The PyTorch code itself: the names alone are our operators where compat/fla is installed.
    return (
        torch.ops.gdn.chunk_gated_delta_rule,
        torch.ops.gdn.fused_recurrent_gated_delta_rule,
        modeling.torch_chunk_gated_delta_rule.__wrapped__,
        modeling.torch_recurrent_gated_delta_rule.__wrapped__,
    )


def make_inputs(args, dtype, tokens):
    """q, k L2-normalised, g = logsigmoid(randn) / 16, beta = sigmoid(randn), a unit-scale state."""
    torch.manual_seed(0)
    normal = torch.randn
    q = torch.nn.functional.normalize(normal(1, tokens, args.key_heads, args.head_dim), dim=-1)
    k = torch.nn.functional.normalize(normal(1, tokens, args.key_heads, args.head_dim), dim=-1)
    v = normal(1, tokens, args.value_heads, args.head_dim)
    g = torch.nn.functional.logsigmoid(normal(1, tokens, args.value_heads)) / 16
    beta = torch.sigmoid(normal(1, tokens, args.value_heads))
    state = normal(1, args.value_heads, args.head_dim, args.head_dim)
    return [q.to(dtype), k.to(dtype), v.to(dtype), g, beta.to(dtype)], state


def ours(op, inputs, state, **options):
    return op(*inputs, initial_state=state, output_final_state=True, **options)


def theirs(function, inputs, state):
    return function(*inputs, initial_state=state, output_final_state=True)


def relative_error(got, want):
    return ((got.double() - want).norm() / want.norm()).item()


def check(name, inputs, state, run_ours, others):
    """Stops unless our error against fp64 is at most twice that of each other."""
    # Our reference in fp64: transformers' functions compute in fp32 whatever they are given.
    recurrent = torch.ops.gdn.fused_recurrent_gated_delta_rule
    exact = ours(recurrent, [x.double() for x in inputs], state.double())
    mine = run_ours()
    for other, run in others.items():
        for part, a, b, want in zip(("output", "state"), mine, run(), exact):
            our_error, error = relative_error(a, want), relative_error(b, want)
            print(f"  {name} {part}: error against fp64 {our_error:.1e} ({other} {error:.1e})")
            if not our_error <= 2 * error + 1e-7:
                sys.exit(f"wrong result: {name} {part}")


def training_step(function, inputs, state, gradients):
    """Forward, and backward from given gradients of the output and the state."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    return torch.autograd.grad(function(leaves, state), leaves, gradients)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--library", default="build/release/lib/libgdn_ops.so")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--key-heads", type=int, default=16)
    parser.add_argument("--value-heads", type=int, default=32)
    parser.add_argument("--head-dim", type=int, default=128, help="K and V")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    chunk, recurrent, their_chunk, their_recurrent = load(args.library)
    import transformers

    with open("/proc/cpuinfo") as cpuinfo:
        models = {line.split(":")[1].strip() for line in cpuinfo if line.startswith("model name")}
    print(
        f"{', '.join(models) or platform.processor()}, {args.threads} threads; "
        f"torch {torch.__version__}, transformers {transformers.__version__}"
    )
    print(
        f"B 1, T {args.tokens}, H/HV {args.key_heads}/{args.value_heads}, K = V = {args.head_dim}"
    )

    for dtype in (torch.float32, torch.bfloat16):
        inputs, state = make_inputs(args, dtype, args.tokens)
        step_inputs, _ = make_inputs(args, dtype, 1)
        gradients = torch.randn_like(inputs[2]), torch.randn_like(state)
        name = str(dtype).removeprefix("torch.")
        check(
            f"{name} chunked",
            inputs,
            state,
            lambda: ours(chunk, inputs, state),
            {"transformers": lambda: theirs(their_chunk, inputs, state)},
        )
        print_header("transformers")
        with torch.no_grad():
            report(
                f"{name} forward",
                [
                    lambda: ours(chunk, inputs, state),
                    lambda: theirs(their_chunk, inputs, state),
                ],
                args.repeats,
            )
        report(
            f"{name} forward + backward",
            [
                lambda: training_step(lambda x, s: ours(chunk, x, s), inputs, state, gradients),
                lambda: training_step(
                    lambda x, s: theirs(their_chunk, x, s), inputs, state, gradients
                ),
            ],
            args.repeats,
        )
        with torch.no_grad():
            report(
                f"{name} decode step",
                [
                    lambda: ours(recurrent, step_inputs, state),
                    lambda: theirs(their_recurrent, step_inputs, state),
                ],
                50 * args.repeats,
            )
    compare_peers(args, chunk, recurrent)


def compare_peers(args, chunk, recurrent):
    """The forward and the decode step in fp32 beside what else is installed."""
    for name, op, tokens in (("forward", chunk, args.tokens), ("decode step", recurrent, 1)):
        inputs, state = make_inputs(args, torch.float32, tokens)
        peers = cpu_peers.forwards(inputs, state, args.threads)
        if not peers:
            return
        check(f"float32 {name}", inputs, state, lambda: ours(op, inputs, state), peers)
        print_header(*peers)
        report(f"float32 {name}", [lambda: ours(op, inputs, state), *peers.values()], args.repeats)


if __name__ == "__main__":
    main()
