#!/usr/bin/env python3
"""Training steps of a 30 M-parameter language model on the CPU: ours beside transformers' PyTorch.

    python benchmarks/cpu_train.py --threads 1 2 --cpus 0 1

The other model is transformers' OLMo-Hybrid with linear layers only: the same layers as ours, one
for one, in plain PyTorch. Both start from the same weights, see the same tokens, and step with
torch's fused AdamW; each lives in a process of its own, and the processes step in turns. Checks
that the losses of the first steps agree, then prints tokens/s (medians), the CPU's time, the ratio
of each to the first, and the peak of resident memory. --bf16 adds both in bf16 autocast (weights
fp32); --profile N prints what N steps of ours are made of instead.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MODELING = "transformers.models.olmo_hybrid.modeling_olmo_hybrid"
FUNCTIONS = (
    "causal_conv1d_fn",
    "causal_conv1d_update",
    "torch_chunk_gated_delta_rule",
    "torch_recurrent_gated_delta_rule",
)
# 31.5 M parameters, 12.6 M of them embeddings and head.
HIDDEN, LAYERS, HEADS, KEY_DIM, EXPAND, MLP, VOCABULARY = 384, 8, 6, 64, 2, 1024, 16384
EPS = 1e-5
CHECKED_STEPS = 3
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}  # of the losses, absolute; they are about 9.7


def make_theirs():
    """transformers' model, in which nothing comes from us."""
    import importlib

    import transformers

    modeling = importlib.import_module(MODELING)
    for name in FUNCTIONS:  # wrapped where transformers has found kernels, ours perhaps
        function = getattr(modeling, name)
        setattr(modeling, name, getattr(function, "__wrapped__", function))
    config = transformers.OlmoHybridConfig(
        hidden_size=HIDDEN,
        intermediate_size=MLP,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        vocab_size=VOCABULARY,
        linear_key_head_dim=KEY_DIM,
        linear_value_head_dim=KEY_DIM * EXPAND,
        linear_allow_neg_eigval=False,
        rms_norm_eps=EPS,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
    )
    config.layer_types = ["linear_attention"] * LAYERS  # the constructor wants one of attention
    return transformers.OlmoHybridForCausalLM(config)


def make_ours():
    from gated_deltanet import GatedDeltaNetConfig, GatedDeltaNetForCausalLM

    return GatedDeltaNetForCausalLM(
        GatedDeltaNetConfig(
            hidden_size=HIDDEN,
            intermediate_size=MLP,
            num_hidden_layers=LAYERS,
            num_heads=HEADS,
            head_dim=KEY_DIM,
            expand_v=EXPAND,
            vocab_size=VOCABULARY,
            norm_eps=EPS,
            fuse_cross_entropy=False,
            fuse_linear_cross_entropy=True,
        )
    )


def our_names(theirs):
    """Their state dict under our names."""
    renamed = {}
    for name, tensor in theirs.items():
        for old, new in (
            ("embed_tokens", "embeddings"),
            ("input_layernorm", "attn_norm"),
            ("post_attention_layernorm", "mlp_norm"),
            ("linear_attn", "attn"),
        ):
            name = name.replace(old, new)
        if name.endswith("conv1d.weight"):
            keys = HEADS * KEY_DIM
            parts = tensor.split([keys, keys, keys * EXPAND])
            for letter, part in zip("qkv", parts):
                renamed[name.replace("conv1d", f"{letter}_conv1d")] = part
        else:
            renamed[name] = tensor
    return renamed


class Stepper:
    """A model with its optimiser, one step after another."""

    def __init__(self, implementation, dtype, folder, tokens):
        import torch

        self.torch, self.dtype = torch, dtype
        weights = torch.load(folder / "weights.pt", mmap=True)
        if implementation == "ours":
            self.model = make_ours()
            self.model.load_state_dict(our_names(weights))
        else:
            self.model = make_theirs()
            self.model.load_state_dict(weights)
        self.model.train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, fused=True)
        self.ids = torch.load(folder / "tokens.pt")[:, :tokens]

    def step(self):
        torch = self.torch
        with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == "bf16"):
            loss = self.model(input_ids=self.ids, labels=self.ids).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


def serve(args):
    """The child: a step for each line "THREADS" of standard input, a line of JSON for each."""
    stepper = Stepper(*args.serve.split(":"), Path(args.folder), args.tokens)
    print(json.dumps({}), flush=True)
    for line in sys.stdin:
        stepper.torch.set_num_threads(int(line))
        before, begin = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        loss = stepper.step()
        seconds, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_SELF)
        answer = {
            "loss": loss,
            "seconds": seconds,
            "cpu": after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime,
            "peak": after.ru_maxrss * 1024,
        }
        print(json.dumps(answer), flush=True)


class Child:
    def __init__(self, args, implementation, dtype, folder):
        self.name, self.dtype = f"{implementation}, {dtype}", dtype
        command = [sys.executable, __file__, "--tokens", str(args.tokens), "--folder", str(folder)]
        self.process = subprocess.Popen(
            [*command, "--serve", f"{implementation}:{dtype}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._answer()

    def _answer(self):
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.name}: the process has ended")
        return json.loads(line)

    def step(self, threads):
        self.process.stdin.write(f"{threads}\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def write_problem(folder, tokens):
    import torch

    torch.manual_seed(0)
    model = make_theirs()
    count = sum(parameter.numel() for parameter in model.parameters())
    torch.save(model.state_dict(), folder / "weights.pt")
    torch.save(torch.randint(VOCABULARY, (1, tokens)), folder / "tokens.pt")
    return count


def check(children, threads):
    """The losses of the first steps must agree with the first child's."""
    losses = {}
    for child in children:
        losses[child.name] = [child.step(threads)["loss"] for _ in range(CHECKED_STEPS)]
        print(f"  losses, {child.name}: {', '.join(f'{x:.5f}' for x in losses[child.name])}")
    want = losses[children[0].name]
    for child in children:
        error = max(abs(x - y) for x, y in zip(losses[child.name], want))
        if not error <= TOLERANCE[child.dtype]:
            sys.exit(f"wrong result: {child.name}: losses differ by {error:.1e}")


def measure(args, children):
    print("| | threads | tokens/s: median (range) | ratio | CPU s a step | ratio | peak MiB |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for threads in args.threads:
        steps = {child.name: [] for child in children}
        for _ in range(args.repeats):
            for child in children:
                steps[child.name].append(child.step(threads))
        first = steps[children[0].name]
        for name, mine in steps.items():

            def median(key, of):
                return statistics.median(step[key] for step in of)

            speeds = [args.tokens / step["seconds"] for step in mine]
            print(
                f"| {name} | {threads} | {statistics.median(speeds):.0f} "
                f"({min(speeds):.0f} to {max(speeds):.0f}) | "
                f"{median('seconds', first) / median('seconds', mine):.2f} | "
                f"{median('cpu', mine):.2f} | {median('cpu', first) / median('cpu', mine):.2f} | "
                f"{mine[-1]['peak'] / 2**20:.0f} |",
                flush=True,
            )


def profile(args, folder):
    import torch

    for dtype in ["fp32", "bf16"] if args.bf16 else ["fp32"]:
        for implementation in ("ours", "theirs"):
            torch.set_num_threads(args.threads[0])
            stepper = Stepper(implementation, dtype, folder, args.tokens)
            stepper.step()
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as result:
                for _ in range(args.profile):
                    stepper.step()
            print(f"{implementation}, {dtype}, {args.profile} steps, {args.threads[0]} threads")
            print(result.key_averages().table(sort_by="self_cpu_time_total", row_limit=22))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", help="libgdn_ops.so, instead of the one that is installed")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--cpus", type=int, nargs="+", help="processors to stay on")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--bf16", action="store_true", help="bf16 autocast as well")
    parser.add_argument("--profile", type=int, default=0, metavar="STEPS")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args)
        return
    if args.library:
        os.environ["GDN_OPS_LIBRARY"] = os.path.abspath(args.library)
    if args.cpus:
        os.sched_setaffinity(0, args.cpus)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        count = write_problem(folder, args.tokens)
        import torch
        import transformers

        with open("/proc/cpuinfo") as file:
            names = {x.split(":")[1].strip() for x in file if x.startswith("model name")}
        print(
            f"{count / 1e6:.1f} M parameters, 1 x {args.tokens} tokens; {', '.join(names)}, "
            f"{torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}, "
            f"transformers {transformers.__version__}"
        )
        if args.profile:
            profile(args, folder)
            return
        dtypes = ["fp32", "bf16"] if args.bf16 else ["fp32"]
        children = [
            Child(args, who, dtype, folder) for dtype in dtypes for who in ("theirs", "ours")
        ]
        check(children, max(args.threads))
        measure(args, children)
        for child in children:
            child.close()


if __name__ == "__main__":
    main()
