"""Greedy generation on a CPU: `gdn generate` beside transformers' generate().

    python benchmarks/cpu_generate.py [--command build/release/bin/gdn]

A model of random weights is saved once, and both read it. Times are differences between a long and
a short continuation, so neither loading nor the prompt is in them; the two take turns, and the
median of their repetitions is printed with all CPU seconds of that repetition.
"""

import argparse
import json
import os
import resource
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PROMPT = b"The state"


def cpu_seconds() -> float:
    """Of this process and of those that it has waited for."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def measure(generate: Callable[[int], None], short: int, long: int) -> tuple[float, float]:
    """Seconds and CPU seconds that the tokens from `short` to `long` take."""
    taken = []
    for tokens in (short, long):
        begin, cpu_begin = time.perf_counter(), cpu_seconds()
        generate(tokens)
        taken.append((time.perf_counter() - begin, cpu_seconds() - cpu_begin))
    return taken[1][0] - taken[0][0], taken[1][1] - taken[0][1]


def by_command(command: str, folder: str, dtype: str, rows: int) -> Callable[[int], None]:
    """Generation by `gdn generate`, which reads the model each time."""
    options = ["--model", folder, "--tokenizer", "byte", "--dtype", dtype, "--json"]
    options += ["--device", "cpu", "--threads", str(torch.get_num_threads()), "--temperature", "0"]
    prompts = ["--prompt", *[PROMPT.decode()] * rows]

    def generate(tokens: int) -> None:
        call = [command, "generate", *options, "--max-new-tokens", str(tokens), *prompts]
        lines = subprocess.run(call, check=True, capture_output=True, text=True).stdout
        counts = [json.loads(line)["tokens"] for line in lines.splitlines()]
        assert counts == [tokens] * rows, f"{counts} tokens instead of {tokens}: another --seed"

    return generate


def by_python(folder: str, dtype: str, rows: int) -> Callable[[int], None]:
    """Generation by transformers."""
    from gated_deltanet import GatedDeltaNetForCausalLM

    model = GatedDeltaNetForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype]).eval()
    ids = torch.tensor([list(PROMPT)] * rows)

    def generate(tokens: int) -> None:
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )

    generate(4)
    return generate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", help="libgdn_ops.so, instead of the one that is installed")
    parser.add_argument("--command", default="build/release/bin/gdn")
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.library:
        os.environ["GDN_OPS_LIBRARY"] = os.path.abspath(args.library)
    from gated_deltanet import GatedDeltaNetConfig, GatedDeltaNetForCausalLM

    torch.manual_seed(args.seed)
    config = GatedDeltaNetConfig(
        hidden_size=args.hidden,
        num_hidden_layers=args.layers,
        num_heads=args.hidden // 128,
        head_dim=128,
        vocab_size=8192,
    )
    model = GatedDeltaNetForCausalLM(config)
    print(f"{model.num_parameters() / 1e6:.1f} M parameters, {torch.get_num_threads()} threads")
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(Path(folder))
        for dtype in args.dtypes:
            for rows in args.rows:
                ways = {
                    "gdn": by_command(args.command, folder, dtype, rows),
                    "Python": by_python(folder, dtype, rows),
                }
                times: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
                for _ in range(args.repetitions):
                    for way, generate in ways.items():
                        times[way].append(measure(generate, 8, 8 + args.tokens))
                for way, taken in times.items():
                    seconds, cpu = sorted(taken)[len(taken) // 2]
                    least = min(taken)[0]
                    print(
                        f"{dtype}, {rows} rows, {way}: {rows * args.tokens / seconds:.1f} tokens/s"
                        f" (best {rows * args.tokens / least:.1f}),"
                        f" {1e3 * seconds / args.tokens:.2f} ms a token,"
                        f" {cpu:.2f} CPU s",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
