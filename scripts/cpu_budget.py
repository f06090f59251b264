#!/usr/bin/env python3
"""Compares the instructions that the CPU kernels execute with benchmarks/cpu_budget.json.

valgrind's callgrind counts what one call executes, so the result does not depend on the machine's
speed or load: a budget that CI can hold. The instruction set is fixed to one that valgrind knows,
glibc's choice of memory functions to their vector loops. One compiler counts alike everywhere; a
count may exceed its budget by TOLERANCE, what a library's update may make of the same source, no
more. --update writes the counts as the new budget.
"""

import argparse
import json
import os
import pathlib
import re
import subprocess
import sys

TOLERANCE = 0.01
TARGET = "AVX2"
BUDGET = pathlib.Path(__file__).parent.parent / "benchmarks" / "cpu_budget.json"
ENTRY = {
    "forward": "gdn::kernels::cpu::chunk_gated_delta_rule(*",
    "backward": "gdn::kernels::cpu::chunk_gated_delta_rule_backward(*",
    "decode": "gdn::kernels::cpu::recurrent_gated_delta_rule(*",
}
# Two value heads of one key head, four chunks: large enough that the kernels' loops dominate.
SHAPE = "--tokens 256 --key-heads 1 --value-heads 2 --head-dim 128 --threads 1 --repeats 1"


def count(benchmark, kernel, dtype):
    """Instructions of one call."""
    # rep stosb would count as one instruction or as many, by the processor's features.
    tunables = ":".join(
        f"glibc.cpu.x86_rep_{name}_threshold=1000000000" for name in ("stosb", "movsb")
    )
    command = [
        "valgrind",
        "--tool=callgrind",
        "--callgrind-out-file=/dev/null",
        f"--toggle-collect={ENTRY[kernel]}",
        str(benchmark),
        *SHAPE.split(),
        *f"--target {TARGET} --dtype {dtype} --pass {kernel}".split(),
    ]
    run = subprocess.run(
        command,
        env={**os.environ, "GLIBC_TUNABLES": tunables},
        capture_output=True,
        text=True,
    )
    collected = re.search(r"Collected : (\d+)", run.stderr)
    if run.returncode != 0 or collected is None:
        sys.exit(f"{' '.join(command)} failed:\n{run.stdout}{run.stderr}")
    return int(collected[1])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--benchmark", default="build/release/bin/gdn_bench_cpu_kernels")
    parser.add_argument("--update", action="store_true", help="write the counts as the budget")
    args = parser.parse_args()
    counts = {
        f"{kernel} {dtype}": count(args.benchmark, kernel, dtype)
        for kernel in ENTRY
        for dtype in ("f32", "bf16")
    }
    if args.update:
        BUDGET.write_text(json.dumps(counts, indent=2) + "\n")
    budget = json.loads(BUDGET.read_text())
    over = []
    for name, instructions in counts.items():
        ratio = instructions / budget[name]
        print(f"{name}: {instructions:,} instructions, {ratio:.3f} of the budget")
        if ratio > 1 + TOLERANCE:
            over.append(name)
        elif ratio < 1 - TOLERANCE:
            print(f"  {name} became leaner: --update holds it to that")
    if over:
        sys.exit(f"over the budget in {BUDGET.name}: {', '.join(over)}")


if __name__ == "__main__":
    main()
