"""Times of the portable CUDA kernels through torch.ops.gdn, beside the floor of their bytes.

Each is checked first against the same operator on the CPU. Run on a machine with a GPU:
    python3 benchmarks/cuda/portable.py build/cuda/lib/libgdn_ops.so
"""

import itertools
import sys

import torch

gdn = torch.ops.gdn
DEVICE = "cuda"


def median_ms(call, repeats=21):
    """Milliseconds of a call: graph replays, so that launches do not count."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    for _ in range(3):
        graph.replay()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    times = sorted(a.elapsed_time(b) for a, b in itertools.pairwise(events))
    return times[repeats // 2]


def copy_rate():
    """Bytes a second that a kernel copies, read and written (a memcpy is slower)."""
    x = torch.randn(1 << 27, device=DEVICE)
    y = torch.empty_like(x)
    return 8 * x.numel() / (1e-3 * median_ms(lambda: torch.neg(x, out=y)))


def report(name, ms, gigabytes, rate):
    floor = gigabytes * 1e9 / rate * 1e3
    print(f"{name:58s} {ms:9.4f} ms  floor {floor:8.4f}  of copy rate {100 * floor / ms:5.1f}%")


def inputs(B, T, H, HV, K, V, dtype):
    def randn(*sizes):
        return torch.randn(*sizes, device=DEVICE)

    q, k = (torch.nn.functional.normalize(randn(B, T, H, K), dim=-1).to(dtype) for _ in "qk")
    g = torch.nn.functional.logsigmoid(randn(B, T, HV)) / 16
    return q, k, randn(B, T, HV, V).to(dtype), g, torch.sigmoid(randn(B, T, HV))


def check(got, want, name, bound):
    error = ((got.double().cpu() - want.double().cpu()).norm() / want.double().norm().cpu()).item()
    print(f"  check {name}: {error:.1e}")
    assert error <= bound, (name, error, bound)


def time_decode(rate):
    print("decode step, state in place, fp32 state, bf16 inputs")
    for B, H, HV, K, V in [
        (1, 16, 32, 128, 128),
        (8, 16, 32, 128, 128),
        (32, 16, 32, 128, 128),
        (64, 16, 32, 128, 128),
        (256, 16, 32, 128, 128),
        (64, 6, 6, 256, 512),
        (1, 6, 6, 256, 512),
    ]:
        for v_first in (False, True):
            args = inputs(B, 1, H, HV, K, V, torch.bfloat16)
            sizes = (B, HV, V, K) if v_first else (B, HV, K, V)
            # Several states, so that none is still in the L2 cache.
            count = max(1, min(16, (256 << 20) // (4 * B * HV * K * V)))
            states = [torch.randn(sizes, device=DEVICE) for _ in range(count)]

            def step(args=args, states=states, v_first=v_first):
                for state in states:
                    gdn.fused_recurrent_gated_delta_rule_update(
                        *args, state, use_qk_l2norm_in_kernel=True, state_v_first=v_first
                    )

            ms = median_ms(step) / count
            name = f"  B {B} heads {H}/{HV} K {K} V {V} {'[V, K]' if v_first else '[K, V]'}"
            report(name, ms, 8e-9 * B * HV * K * V, rate)


def time_chunks():
    print("chunked, bf16; chunk_size 32 is the portable forward")
    for B, T, H, HV, K, V in [
        (4, 8192, 16, 32, 128, 128),
        (1, 8192, 16, 32, 128, 128),
        (16, 2048, 6, 6, 256, 512),
    ]:
        args = inputs(B, T, H, HV, K, V, torch.bfloat16)
        name = f"B {B} T {T} heads {H}/{HV} K {K} V {V}"
        for chunk_size in (64, 32):
            with torch.no_grad():
                ms = median_ms(
                    lambda c=chunk_size, a=args: gdn.chunk_gated_delta_rule(*a, chunk_size=c)
                )
            print(
                f"  forward B {B} T {T} {H}/{HV} K {K} V {V} chunk_size {chunk_size}: {ms:.3f} ms"
            )
        o, _, segments = gdn.gated_delta_rule_forward(
            *args, None, None, None, False, False, 64, False, True, True
        )
        d_o = torch.randn_like(o)
        ms = median_ms(
            lambda: gdn.gated_delta_rule_backward(
                d_o, None, *args, None, None, segments, None, False, False, 64
            ),
            repeats=5,
        )
        print(f"  backward {name}: {ms:.3f} ms", flush=True)


def time_elementwise(rate):
    print("element-wise, bf16")
    M, D = 32768, 2048
    elements = M * D * 2e-9
    x, gate, d_y = (torch.randn(M, D, device=DEVICE, dtype=torch.bfloat16) for _ in range(3))
    weight = torch.randn(D, device=DEVICE)
    small = x.view(-1, 128)
    report("  rms_norm", median_ms(lambda: gdn.rms_norm(x, weight, 1e-5)), 2 * elements, rate)
    ms = median_ms(lambda: gdn.norm_backward(d_y, x, None, weight, None, 1e-5, False))
    report("  rms_norm backward", ms, 3 * elements, rate)
    heads = weight[:128].contiguous()
    ms = median_ms(lambda: gdn.rms_norm_gated(small, gate.view(-1, 128), heads, 1e-5))
    report("  rms_norm_gated, rows of 128", ms, 3 * elements, rate)
    ms = median_ms(
        lambda: gdn.norm_backward(
            d_y.view(-1, 128), small, gate.view(-1, 128), heads, None, 1e-5, False
        )
    )
    report("  rms_norm_gated backward, rows of 128", ms, 5 * elements, rate)
    report("  l2_norm, rows of 128", median_ms(lambda: gdn.l2_norm(small)), 2 * elements, rate)
    report("  swiglu", median_ms(lambda: gdn.swiglu(x, gate)), 3 * elements, rate)
    ms = median_ms(lambda: gdn.swiglu_backward(d_y, x, gate))
    report("  swiglu backward", ms, 5 * elements, rate)
    taps = torch.randn(D, 4, device=DEVICE)
    sequences = x.view(16, 2048, D)
    ms = median_ms(lambda: gdn.causal_conv1d(sequences, taps, None, "silu"))
    report("  causal_conv1d", ms, 2 * elements, rate)
    ms = median_ms(
        lambda: gdn.causal_conv1d_backward(
            d_y.view(16, 2048, D), None, sequences, taps, None, "silu", None, None
        )
    )
    report("  causal_conv1d backward", ms, 3 * elements, rate)
    a = torch.randn(M, 32, device=DEVICE, dtype=torch.bfloat16)
    head = torch.randn(32, device=DEVICE)
    g = gdn.gated_delta_rule_gate(a, head, head)
    ms = median_ms(lambda: gdn.gated_delta_rule_gate(a, head, head))
    report("  gate", ms, M * 32 * 6e-9, rate)
    ms = median_ms(lambda: gdn.gated_delta_rule_gate_backward(g, a, head, head))
    report("  gate backward", ms, M * 32 * 8e-9, rate)
    logits = torch.randn(8192, 32000, device=DEVICE, dtype=torch.bfloat16)
    target = torch.randint(32000, (8192,), device=DEVICE)
    loss, total = gdn.cross_entropy_rows(logits, target, -100)
    ms = median_ms(lambda: gdn.cross_entropy_rows(logits, target, -100))
    report("  cross_entropy, vocabulary 32000", ms, logits.numel() * 2e-9, rate)
    ms = median_ms(lambda: gdn.cross_entropy_rows_backward(loss, logits, target, total, -100))
    report("  cross_entropy backward", ms, logits.numel() * 4e-9, rate)


def check_all():
    """A few results against the CPU; tests/cuda has the rest."""
    for chunk_size in (64, 32):
        args = inputs(1, 200, 2, 4, 128, 128, torch.bfloat16)
        got = gdn.chunk_gated_delta_rule(*args, chunk_size=chunk_size)[0]
        want = gdn.chunk_gated_delta_rule(*(x.cpu() for x in args))[0]
        check(got, want, f"chunk_size {chunk_size}", 2e-2)
    x = torch.randn(64, 2048, device=DEVICE, dtype=torch.bfloat16)
    check(gdn.l2_norm(x), gdn.l2_norm(x.cpu()), "l2_norm", 8e-3)
    check(gdn.swiglu(x, x), gdn.swiglu(x.cpu(), x.cpu()), "swiglu", 8e-3)


def main():
    torch.ops.load_library(sys.argv[1])
    torch.manual_seed(0)
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    check_all()
    rate = copy_rate()
    print(f"copy {rate / 1e12:.2f} TB/s, read and written")
    time_decode(rate)
    time_elementwise(rate)
    time_chunks()


if __name__ == "__main__":
    main()
