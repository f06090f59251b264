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


def print_header(*others):
    columns = "".join(f" {other} | times ours |" for other in others)
    print(
        f"| case | ours, ms: median (range) |{columns}\n| --- | --- |"
        + " --- | --- |" * len(others)
    )


def report(name, functions, repeats):
    """Prints the row of a case: `functions` are ours and then the others."""
    times = time_in_turns(functions, repeats)
    cells = [f"{median:.3f} ({low:.3f} to {high:.3f})" for median, low, high in times]
    row = [name, cells[0]]
    for cell, (median, _, _) in zip(cells[1:], times[1:]):
        row += [cell, f"{median / times[0][0]:.1f}"]
    print(f"| {' | '.join(row)} |", flush=True)
