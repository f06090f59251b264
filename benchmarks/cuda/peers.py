"""The chunked gated delta rule beside every other implementation that can be imported.

    python benchmarks/cuda/peers.py

Checks each one against the recurrence in fp64 on small shapes, and then times them in turns: CUDA
graph replay, median, no L2 norm inside, inputs as other projects' benchmarks have them. Prints what
the operations and the bytes take at least on this machine (by its copy rate and matrix product),
and ratios to the best of the others, losses first. The first use of a peer compiles for minutes.
"""

import argparse
import importlib.metadata
import math
import os
import statistics
import time

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize

K, V, CHUNK = 128, 128, 64
LENGTHS = [
    [32768], [8192], [2048], [16384] * 2, [4096, 28672], [8192] * 4, [4096] * 8, [2048] * 4,
    [1024] * 8,
]  # fmt: skip
FORWARD = [
    (H, HV, K, V, lengths) for H, HV in ((2, 8), (8, 32), (16, 64), (16, 32)) for lengths in LENGTHS
]
BACKWARD = [
    (H, HV, K, V, [total // n] * n)
    for H, HV in ((16, 32), (4, 8))
    for total in (8192, 32768)
    for n in (1, 2, 4, 8)
]
WIDE = [(6, 6, 256, 512, [2048] * 16)]
CHECKED = [(2, 4, K, V, [320, 200]), (6, 6, 256, 512, [320, 200])]


class Ours:
    def __init__(self) -> None:
        from gated_deltanet.ops import chunk_gated_delta_rule

        self.rule = chunk_gated_delta_rule

    def __call__(self, q, k, v, g, beta, cu_seqlens):
        return self.rule(q, k, v, g, beta, cu_seqlens=cu_seqlens, output_final_state=True)


class Fla(Ours):
    def __init__(self) -> None:
        # It hands its work to flash-qla where that is installed, which has a column of its own.
        os.environ["FLA_FLASH_QLA"] = "0"
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule

        self.rule = chunk_gated_delta_rule


class FlashQla(Ours):
    def __init__(self) -> None:
        from flash_qla import chunk_gated_delta_rule

        self.rule = chunk_gated_delta_rule


class FlashInfer:
    """Forward alone; its gate is the decay itself, its sequences are always packed."""

    def __init__(self) -> None:
        from flashinfer.gdn_prefill import chunk_gated_delta_rule

        self.rule = chunk_gated_delta_rule

    def __call__(self, q, k, v, g, beta, cu_seqlens):
        if q.requires_grad:
            raise NotImplementedError("no backward")
        if cu_seqlens is None:
            cu_seqlens = torch.arange(2, device=q.device) * q.shape[1]  # a graph may record it
        o, state = self.rule(
            q[0], k[0], v[0], g[0].exp(), beta[0], cu_seqlens=cu_seqlens, output_final_state=True
        )
        return o.unsqueeze(0), state.transpose(-1, -2)


PEERS = {
    "gated-deltanet": Ours,
    "flash-linear-attention": Fla,
    "flash-qla": FlashQla,
    "flashinfer-python": FlashInfer,
}


def inputs(H: int, HV: int, K: int, V: int, lengths: list[int]) -> dict[str, Tensor | None]:
    generator = torch.Generator("cuda").manual_seed(0)
    T = sum(lengths)

    def randn(*sizes: int) -> Tensor:
        return torch.randn(1, T, *sizes, generator=generator, device="cuda")

    ends = torch.tensor([0, *lengths]).cumsum(0)
    return {
        "q": normalize(randn(H, K), dim=-1).bfloat16(),
        "k": normalize(randn(H, K), dim=-1).bfloat16(),
        "v": randn(HV, V).bfloat16(),
        "g": logsigmoid(randn(HV)) / 16,
        "beta": randn(HV).sigmoid(),
        "cu_seqlens": None if len(lengths) == 1 else ends.cuda(),
    }


def with_gradients(rule, x: dict) -> tuple[list[Tensor], Tensor, Tensor]:
    """The inputs that have gradients, o and the final state."""
    leaves = [x[name].detach().requires_grad_() for name in ("q", "k", "v", "g", "beta")]
    o, state = rule(*leaves, x["cu_seqlens"])
    return leaves, o, state


def errors(rule, case, backward: bool) -> dict[str, float]:
    """Relative to the norm of what the recurrence gives in fp64."""
    x = inputs(*case)
    exact_x = {
        name: t.double().cpu() if t.is_floating_point() else t.cpu() for name, t in x.items()
    }
    d_o = torch.randn(x["v"].shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    exact_leaves, *exact = with_gradients(Ours(), exact_x)
    exact += torch.autograd.grad(exact[0], exact_leaves, d_o.double())
    if backward:
        leaves, *got = with_gradients(rule, x)
        got += torch.autograd.grad(got[0], leaves, d_o.cuda())
    else:
        got = rule(*(x[n] for n in ("q", "k", "v", "g", "beta")), x["cu_seqlens"])
    names = ["o", "final_state", "d_q", "d_k", "d_v", "d_g", "d_beta"]
    return {
        name: ((a.detach().double().cpu() - b).norm() / b.norm()).item()
        for name, a, b in zip(names, got, exact)
    }


def graph_of(call, stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        call()
    return graph


def median_ms(replays: list, seconds: float = 0.15) -> list[float]:
    """Of each, called in turns; L2 holds whatever the others left."""
    times: list[list[float]] = [[] for _ in replays]
    if not replays:
        return []
    begin = time.monotonic()
    while time.monotonic() - begin < seconds * len(replays) or len(times[0]) < 7:
        for replay, mine in zip(replays, times):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            replay()
            end.record()
            end.synchronize()
            mine.append(start.elapsed_time(end))
    return [statistics.median(mine[2:]) for mine in times]


def prepared(rule, x: dict, backward: bool):
    """A function that runs the forward or the backward once, as a graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    if backward:
        with torch.cuda.stream(stream):
            leaves, o, _ = with_gradients(rule, x)
            d_o = torch.randn_like(o)
        call = lambda: torch.autograd.grad(o, leaves, d_o, retain_graph=True)  # noqa: E731
    else:
        arguments = [x[n] for n in ("q", "k", "v", "g", "beta", "cu_seqlens")]
        call = lambda: rule(*arguments)  # noqa: E731
    graph = graph_of(call, stream)

    def replay() -> None:
        graph.replay()

    replay.reads = call  # whose tensors the graph has only the addresses of
    return replay


def floors(
    H: int, HV: int, K: int, V: int, lengths: list[int], backward: bool
) -> tuple[float, float]:
    """Operations of the leanest chunked form, and bytes of inputs and outputs."""
    chunks = sum(math.ceil(length / CHUNK) for length in lengths)
    T = sum(lengths)
    per_value_head = 2 * CHUNK * K * V * 3 + 2 * CHUNK * CHUNK * V * 2
    per_key_head = 2 * CHUNK * CHUNK * K * 2
    operations = chunks * (HV * per_value_head + H * per_key_head)
    tensors = T * (2 * (2 * H * K + 2 * HV * V) + 8 * HV)
    if not backward:
        return operations, tensors + 4 * len(lengths) * HV * K * V
    # State again, 7 products with a state and 9 of a chunk with itself; every tensor in and out.
    products = 2 * CHUNK * K * V * 8 + 2 * CHUNK * CHUNK * max(K, V) * 10
    return chunks * HV * products, T * (2 * (4 * H * K + 3 * HV * V) + 16 * HV)


def machine() -> tuple[float, float]:
    """Bytes a second of a copy, operations a second of a large bf16 product."""
    big = torch.empty(1 << 30, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(big)
    a = torch.randn(8192, 8192, device="cuda").bfloat16()
    copy, product = median_ms([lambda: target.copy_(big), lambda: a @ a])
    return 2 * big.nbytes / copy * 1e3, 2 * 8192**3 / product * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", choices=list(PEERS), action="append", help="default: all there are"
    )
    parser.add_argument("--cases", choices=["forward", "backward", "wide"], action="append")
    parser.add_argument("--heads", help="only these, as 16/32")
    args = parser.parse_args()

    rules = {}
    for name, make in PEERS.items():
        if args.only and name not in args.only:
            continue
        try:
            rules[name] = make()
            print(f"{name} {importlib.metadata.version(name) if name != 'gated-deltanet' else ''}")
        except Exception as error:
            print(f"{name}: not imported ({type(error).__name__}: {error})")
    copy_rate, product_rate = machine()
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}: "
        f"copy {copy_rate / 1e12:.2f} TB/s, bf16 product {product_rate / 1e12:.0f} TFLOP/s"
    )
    for case in CHECKED:
        H, HV, K, V, lengths = case
        print(f"\nrelative error against fp64, {H}/{HV} heads of {K}/{V}, sequences of {lengths}")
        for name, rule in rules.items():
            print_errors(name, rule, case)

    groups = {
        "forward": (FORWARD, [False]),
        "backward": (BACKWARD, [True]),
        "wide": (WIDE, [False, True]),
    }
    for title, (cases, directions) in groups.items():
        if args.cases and title not in args.cases:
            continue
        wanted = [case for case in cases if args.heads in (None, f"{case[0]}/{case[1]}")]
        for backward in directions:
            print(f"\n{title}, {'backward' if backward else 'forward'}, ms")
            print(f"| H/HV, K/V, sequences | floor | {' | '.join(rules)} | ratio |", flush=True)
            print_table(
                [measure(rules, case, backward, copy_rate, product_rate) for case in wanted]
            )


def print_errors(name: str, rule, case) -> None:
    for backward in (True, False):
        try:
            found = errors(rule, case, backward)
            print(name, ", ".join(f"{key} {x:.1e}" for key, x in found.items()), flush=True)
            return
        except Exception as error:  # a peer that cannot do it
            direction = "backward" if backward else "forward"
            print(f"{name}, {direction}: {type(error).__name__}: {str(error)[:200]}")


def measure(rules, case, backward, copy_rate, product_rate) -> tuple[float | None, str]:
    """Ratio of the best other one to ours, where there are both, and a row of the table."""
    H, HV, K, V, lengths = case
    x = inputs(*case)
    replays, cells = {}, {}
    for name, rule in rules.items():
        try:
            replays[name] = prepared(rule, x, backward)
        except Exception as error:  # a peer that cannot do it
            cells[name] = type(error).__name__
            torch.cuda.synchronize()
    times = dict(zip(replays, median_ms(list(replays.values()))))
    cells |= {name: f"{ms:.3f}" for name, ms in times.items()}
    operations, moved = floors(*case, backward)
    floor = max(operations / product_rate, moved / copy_rate) * 1e3
    ours = times.pop("gated-deltanet", None)
    ratio = min(times.values()) / ours if times and ours else None
    same = len(set(lengths)) == 1
    sequences = f"{len(lengths)} x {lengths[0]}" if same else "+".join(map(str, lengths))
    row = [f"{H}/{HV}, {K}/{V}, {sequences}", f"{floor:.3f}", *(cells[name] for name in rules)]
    torch.cuda.empty_cache()
    return ratio, f"| {' | '.join(row)} | {f'{ratio:.2f}' if ratio else ''} |"


def print_table(rows: list[tuple[float | None, str]]) -> None:
    for _, row in sorted(rows, key=lambda entry: entry[0] or 0):
        print(row, flush=True)
    ratios = [ratio for ratio, _ in rows if ratio]
    if ratios:
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        below = sum(ratio < 1 for ratio in ratios)
        print(f"geometric mean {mean:.2f} of {len(ratios)} cases, {below} below 1", flush=True)


if __name__ == "__main__":
    main()
