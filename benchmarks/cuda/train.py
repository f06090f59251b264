"""Training steps of a language model on one GPU: ours or flash-linear-attention's, one recipe.

    python benchmarks/cuda/train.py ours
    python benchmarks/cuda/train.py fla

bf16 weights, torch's fused AdamW, random tokens; ours with the loss that holds no logits, fla's as
its configuration has it, or likewise with --linear-cross-entropy. A process measures one of them,
so that neither finds the other's memory or caches. Prints the seconds from the start of the process
to the end of the third step, tokens/s (median of the steps after it) and the peak of allocated
memory.
"""

import argparse
import os
import statistics
import time

import torch


def started() -> float:
    """When this process began, in time.monotonic()'s seconds since boot."""
    with open("/proc/self/stat") as file:
        ticks = int(file.read().rsplit(")", 1)[1].split()[19])
    return ticks / os.sysconf("SC_CLK_TCK")


def make_model(implementation: str, options: dict) -> torch.nn.Module:
    if implementation == "ours":
        from gated_deltanet import GatedDeltaNetConfig, GatedDeltaNetForCausalLM
    else:
        from fla.models import GatedDeltaNetConfig, GatedDeltaNetForCausalLM
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = GatedDeltaNetForCausalLM(GatedDeltaNetConfig(**options))
    torch.set_default_dtype(torch.float32)
    return model.train()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("implementation", choices=["ours", "fla"])
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--hidden-size", type=int, default=2048)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--head-dim", type=int, default=256)
    parser.add_argument("--expand-v", type=float, default=2.0)
    parser.add_argument("--vocab-size", type=int, default=32000)
    parser.add_argument("--steps", type=int, default=11)
    parser.add_argument("--linear-cross-entropy", action="store_true")
    parser.add_argument("--profile", action="store_true", help="time by kernel, of one more step")
    args = parser.parse_args()

    torch.manual_seed(0)
    options = {
        "hidden_size": args.hidden_size,
        "num_hidden_layers": args.layers,
        "num_heads": args.heads,
        "head_dim": args.head_dim,
        "expand_v": args.expand_v,
        "vocab_size": args.vocab_size,
    }
    if args.implementation == "ours" or args.linear_cross_entropy:
        options |= {"fuse_cross_entropy": False, "fuse_linear_cross_entropy": True}
    model = make_model(args.implementation, options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    count = sum(parameter.numel() for parameter in model.parameters())
    shape = (args.batch_size, args.seq_len)

    def step() -> float:
        tokens = torch.randint(args.vocab_size, shape, device="cuda")
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    times, losses = [], []
    for i in range(args.steps):
        begin = time.perf_counter()
        losses.append(step())
        times.append(time.perf_counter() - begin)
        if i == 2:
            third = time.clock_gettime(time.CLOCK_BOOTTIME) - started()
            print(f"process start to the end of step 3: {third:.1f} s", flush=True)
    seconds = statistics.median(times[3:])
    print(
        f"{args.implementation}: {count / 1e6:.0f} M parameters, {shape[0]} x {shape[1]}, "
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}: "
        f"{shape[0] * shape[1] / seconds:,.0f} tokens/s, {seconds * 1e3:.1f} ms a step, "
        f"peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB, "
        f"loss {losses[0]:.3f} to {losses[-1]:.3f}",
        flush=True,
    )
    if args.profile:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            step()
        table = profile.key_averages()
        print(table.table(sort_by="cuda_time_total", row_limit=40, max_name_column_width=90))


if __name__ == "__main__":
    main()
