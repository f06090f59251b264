#!/usr/bin/env python3
"""transformers' own Qwen3-Next on the CPU, with our operators and without, in one run.

A small random model with Gated DeltaNet heads of full size: H/HV 16/32, K = V = 128. Checks that
both ways agree, then times prefill and training step (forward, backward, AdamW) in turns and prints
medians, spread and ratios. Needs gated_deltanet and compat/fla, which transformers picks up; the
gated norms are fused too. The larger --hidden-size, the more of the time are matrix products that
both ways share.
"""

import argparse
import copy
import importlib
import os
import platform
import sys
from unittest import mock

import torch
import transformers
from support.timing import print_header, report

MODELING = "transformers.models.qwen3_next.modeling_qwen3_next"
FUNCTIONS = (
    "causal_conv1d_fn",
    "causal_conv1d_update",
    "torch_chunk_gated_delta_rule",
    "torch_recurrent_gated_delta_rule",
)


def without_us():
    """transformers' PyTorch code, which it wrapped when it found our operators."""
    modeling = importlib.import_module(MODELING)
    plain = {name: getattr(modeling, name).__wrapped__ for name in FUNCTIONS}
    return mock.patch.multiple(modeling, **plain)


def make_model(args, dtype):
    torch.manual_seed(0)
    config = transformers.Qwen3NextConfig(
        hidden_size=args.hidden_size,
        num_hidden_layers=args.layers,  # every fourth is full attention
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        linear_num_key_heads=16,
        linear_num_value_heads=32,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=args.hidden_size,
        shared_expert_intermediate_size=args.hidden_size,
        vocab_size=1024,
    )
    return transformers.Qwen3NextForCausalLM(config).to(dtype)


@torch.no_grad()
def prefill(model, ids):
    """The prompt's last logits, and a cache to go on from."""
    model.eval()
    return model(ids, use_cache=True, logits_to_keep=1).logits


def training_step(model, ids, optimizer):
    model.train()
    model(ids, labels=ids, use_cache=False).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def check(with_us, plain, ids):
    """Stops unless both ways agree to half of the dtype's digits; tests/compat compares closely."""
    ours = prefill(with_us, ids).double()
    with without_us():
        theirs = prefill(plain, ids).double()
    difference = ((ours - theirs).norm() / theirs.norm()).item()
    print(f"  relative difference of the last logits: {difference:.1e}", flush=True)
    if not difference <= torch.finfo(plain.dtype).eps ** 0.5:
        sys.exit("wrong result")


def report_both(name, with_us, plain, function, repeats):
    def run_plain():
        with without_us():
            function(plain)

    report(name, [lambda: function(with_us), run_plain], repeats)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--library", help="libgdn_ops.so, instead of the one that is installed")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.library:
        os.environ["GDN_OPS_LIBRARY"] = args.library
    import fla.ops.gated_delta_rule as found
    import gated_deltanet.ops as ours
    from gated_deltanet.models import fuse_gated_norms

    if found.chunk_gated_delta_rule is not ours.chunk_gated_delta_rule:
        sys.exit(f"fla is {found.__file__}, not ours")

    with open("/proc/cpuinfo") as cpuinfo:
        names = {line.split(":")[1].strip() for line in cpuinfo if line.startswith("model name")}
    print(
        f"{', '.join(names) or platform.processor()}, {args.threads} threads; "
        f"torch {torch.__version__}, transformers {transformers.__version__}\n"
        f"B 1, T {args.tokens}, hidden {args.hidden_size}, {args.layers} layers"
    )
    ids = torch.randint(1024, (1, args.tokens), generator=torch.Generator().manual_seed(0))
    plain = make_model(args, getattr(torch, args.dtype))
    with_us = copy.deepcopy(plain)
    fuse_gated_norms(with_us)
    optimizers = {m: torch.optim.AdamW(m.parameters(), lr=1e-4) for m in (with_us, plain)}
    check(with_us, plain, ids)
    print_header("without us")
    models = (with_us, plain)
    report_both(f"{args.dtype} prefill", *models, lambda m: prefill(m, ids), args.repeats)
    report_both(
        f"{args.dtype} training step",
        *models,
        lambda m: training_step(m, ids, optimizers[m]),
        args.repeats,
    )


if __name__ == "__main__":
    main()
