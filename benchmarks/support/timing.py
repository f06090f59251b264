"""Times functions beside each other within one run, and prints one row of a table for each case."""

import statistics
import time


def time_in_turns(functions, repeats):
    """(median, least, greatest) in ms of each, the functions called in turns after a warm-up."""
    times = [[] for _ in functions]
    for repeat in range(repeats + 1):
        for function, mine in zip(functions, times):
            start = time.perf_counter()
            function()
            if repeat > 0:
                mine.append((time.perf_counter() - start) * 1e3)
    return [(statistics.median(t), min(t), max(t)) for t in times]


def print_header(other):
    print(f"| case | ours, ms: median (range) | {other} | ratio |\n| --- | --- | --- | --- |")


def report(name, functions, repeats):
    """Prints the row of a case: `functions` are ours and the other one."""
    (ours, low, high), (other, other_low, other_high) = time_in_turns(functions, repeats)
    print(
        f"| {name} | {ours:.3f} ({low:.3f} to {high:.3f}) | "
        f"{other:.3f} ({other_low:.3f} to {other_high:.3f}) | {other / ours:.1f} |",
        flush=True,
    )
