#!/usr/bin/env python3
"""Trains a byte-level Gated DeltaNet on the sources of Python's standard library, in minutes.

Then shows a sample, and the bits per byte on held-out files beside those of gzip -9 and of an
order-3 byte model, and draws the loss curve. Everything lands in a new folder OUT/run-N.
"""

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import zlib
from pathlib import Path

import matplotlib
from byte_model import ByteModel

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# Not on every machine, or not part of the library itself.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idlelib"}
PROMPT = 'def read_lines(path, encoding="utf-8"):\n    """'
# 1.2 million parameters and small batches: the best of what minutes on two cores allow.
MODEL = {
    "hidden-size": 128,
    "layers": 4,
    "heads": 2,
    "head-dim": 64,
    "expand-v": 1.0,
    "seq-len": 1024,
    "batch-size": 1,
    "lr": 3e-3,
    "warmup": 50,
    "min-lr-ratio": 0.02,
    "save-every": 0,
    "eval-every": 0,
}
PROBE_STEPS = 20


def fail(message):
    sys.exit(f"demo: {message}")


def gdn(program, *arguments, capture=False):
    """Runs the command; its output goes to the terminal, or is returned."""
    result = subprocess.run([program, *map(str, arguments)], text=True, capture_output=capture)
    if result.returncode != 0:
        fail(f"gdn {arguments[0]} failed" + (f": {result.stderr.strip()}" if capture else ""))
    return result.stdout


def split_library(folder):
    """Copies the library: files with crc32(path) % 10 == 0 to held-out, the rest to train."""
    root = Path(sysconfig.get_paths()["stdlib"])
    texts = {"train": [], "held-out": []}
    for file in sorted(root.rglob("*.py")):
        path = file.relative_to(root)
        text = file.read_bytes()
        if SKIPPED_FOLDERS & set(path.parts) or not text:
            continue
        part = "held-out" if zlib.crc32(path.as_posix().encode()) % 10 == 0 else "train"
        target = folder / part / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(text)
        texts[part].append(text)
    if not texts["held-out"]:
        fail(f"no Python sources in {root}")
    return texts["train"], texts["held-out"]


def flags(options):
    return [part for key, value in options.items() for part in (f"--{key}", value)]


def choose_precision(program):
    """bf16 where the processor multiplies it faster than fp32."""
    info = json.loads(gdn(program, "info", "--json", capture=True))
    return "bf16" if info["torch_kernels"]["matrix_instructions"] else "fp32"


def steps_for(minutes, program, options):
    """As many steps as the minutes allow, by the speed of the first few."""
    with tempfile.TemporaryDirectory() as folder:
        probe = options | {"out": Path(folder) / "run", "steps": PROBE_STEPS, "log-every": 1}
        gdn(program, "train", *flags(probe | {"eval-tokens": 1}), capture=True)
        records = read_metrics(Path(folder) / "run")
    speeds = sorted(record["tokens_per_second"] for record in records[PROBE_STEPS // 2 :])
    tokens_per_step = options["batch-size"] * options["seq-len"]
    return max(100, round(minutes * 60 * speeds[len(speeds) // 2] / tokens_per_step))


def read_metrics(run):
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [record for record in records if "lr" in record]


def draw_loss(run, picture, result):
    records = read_metrics(run)
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot(
        [record["tokens"] / 1e6 for record in records],
        [record["loss"] / 0.6931471805599453 for record in records],
        linewidth=1,
        label="training",
    )
    axes.axhline(result, color="tab:orange", linestyle="--", label=f"held-out: {result:.3f}")
    axes.set(xlabel="million bytes", ylabel="bits per byte", ylim=(0, 6))
    axes.set_title("Gated DeltaNet on Python's standard library")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture, dpi=120)


def gzip_bytes(text):
    return len(subprocess.run(["gzip", "-9nc"], input=text, stdout=subprocess.PIPE).stdout)


def next_run(out):
    number = 1
    while (out / f"run-{number}").exists():
        number += 1
    return out / f"run-{number}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gdn", default="build/release/bin/gdn", help="the command")
    parser.add_argument("--out", default="demo", type=Path, help="folder for the runs")
    parser.add_argument("--minutes", default=4.0, type=float, help="time for training")
    arguments = parser.parse_args()
    program, run = arguments.gdn, next_run(arguments.out)
    if not os.access(program, os.X_OK):
        fail(f"no command at {program}: run 'make build'")

    data = arguments.out / "data"
    train, held_out = split_library(data)
    size = sum(map(len, held_out))
    print(f"{len(train)} files to train on, {sum(map(len, train)) / 1e6:.1f} MB")
    print(f"{len(held_out)} held-out files, {size / 1e6:.2f} MB")

    options = {"data": data / "train", "eval-data": data / "held-out"}
    options |= {"dtype": choose_precision(program)} | MODEL
    options["steps"] = steps_for(arguments.minutes, program, options)
    gdn(program, "train", *flags(options | {"out": run}))

    print(f"\nA sample, continuing {PROMPT!r}:\n\n{PROMPT}", end="", flush=True)
    sampling = {"prompt": PROMPT, "max-new-tokens": 400, "temperature": 0.7, "seed": 1}
    gdn(program, "generate", "--model", run, *flags(sampling))

    evaluation = ["eval", "--model", run, "--data", data / "held-out", "--json"]
    ours = json.loads(gdn(program, *evaluation, capture=True))["bits_per_byte"]
    order3 = ByteModel(b"".join(train)).bits(b"".join(held_out))
    draw_loss(run, run / "loss.png", ours)
    print("\nBits per byte on the held-out files (less is better)")
    print(f"  Gated DeltaNet                  {ours:.3f}")
    print(f"  gzip -9, all files as one       {8 * gzip_bytes(b''.join(held_out)) / size:.3f}")
    print(f"  gzip -9, each file by itself    {8 * sum(map(gzip_bytes, held_out)) / size:.3f}")
    print(f"  order-3 byte model, adaptive    {order3 / size:.3f}")
    print(f"\nmodel and metrics: {run}    loss curve: {run / 'loss.png'}")


if __name__ == "__main__":
    main()
