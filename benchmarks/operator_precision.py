"""Errors of every operator against fp64, beside those of plain PyTorch at the same precision.

An error is the norm of the difference over the norm of the fp64 result, the largest of all results
(and of all gradients, in the columns that say so). Inputs are rounded to the precision first, so
that only computing is measured. Plain PyTorch computes the recurrence and losses in fp32, as
transformers does, and everything else in the precision itself, as PyTorch does.

Usage: operator_precision.py [--library PATH_OF_LIBGDN_OPS] [--device cuda]
"""

import argparse
import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
COLUMNS = ("forward", "backward", "varlen", "GVA", "state")
B, T, H, K, V, D = 2, 100, 2, 32, 24, 48
ENDS = (0, 37, 38, 38, 100)  # packed sequences, one of them empty
Tensors = dict[str, Tensor]


def wide(x: Tensor) -> Tensor:
    """fp32, or fp64 as it is."""
    return x if x.dtype == torch.float64 else x.float()


def plain_l2(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def plain_rule(x: Tensors) -> list[Tensor]:
    """The recurrence, token by token: o and the final state."""
    q, k, v = plain_l2(wide(x["q"])), plain_l2(wide(x["k"])), wide(x["v"])
    group = v.shape[2] // q.shape[2]
    q, k = q.repeat_interleave(group, 2), k.repeat_interleave(group, 2)
    decay, beta = wide(x["g"]).exp(), wide(x["beta"])
    state = x.get("state")
    if state is None:
        state = v.new_zeros(v.shape[0], v.shape[2], k.shape[-1], v.shape[-1])
    outputs = []
    for t in range(q.shape[1]):
        state = state * decay[:, t, :, None, None]
        u = beta[:, t, :, None] * (v[:, t] - torch.einsum("bhkv,bhk->bhv", state, k[:, t]))
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], u)
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]) * q.shape[-1] ** -0.5)
    return [torch.stack(outputs, 1).to(x["v"].dtype), state]


def our_rule(name: str) -> Callable[..., list[Tensor]]:
    def run(x: Tensors, cu_seqlens: Tensor | None = None) -> list[Tensor]:
        return list(
            getattr(torch.ops.gdn, name)(
                x["q"], x["k"], x["v"], x["g"], x["beta"], initial_state=x.get("state"),
                output_final_state=True, use_qk_l2norm_in_kernel=True, cu_seqlens=cu_seqlens,
            )
        )  # fmt: skip

    return run


def plain_convolution(x: Tensors) -> list[Tensor]:
    taps, history = x["weight"], x.get("state")
    if history is None:
        history = x["x"].new_zeros(x["x"].shape[0], D, taps.shape[1] - 1)
    line = torch.cat([history, x["x"].transpose(1, 2)], 2)
    y = functional.conv1d(line, taps.unsqueeze(1), x["bias"], groups=D)
    return [functional.silu(y).transpose(1, 2), line[:, :, line.shape[2] - history.shape[2] :]]


def our_convolution(x: Tensors, cu_seqlens: Tensor | None = None) -> list[Tensor]:
    y, state = torch.ops.gdn.causal_conv1d(
        x["x"], x["weight"], x["bias"], "silu", x.get("state"), True, cu_seqlens
    )
    return [y, state]


def rule_inputs(rows: int, value_heads: int, with_state: bool) -> Tensors:
    x = {
        "q": torch.randn(rows, T, H, K),
        "k": torch.randn(rows, T, H, K),
        "v": torch.randn(rows, T, value_heads, V),
        "g": -torch.rand(rows, T, value_heads) * 0.3,
        "beta": torch.rand(rows, T, value_heads),
    }
    return {**x, "state": torch.randn(rows, value_heads, K, V)} if with_state else x


def convolution_inputs(rows: int, _: int, with_state: bool) -> Tensors:
    x = {"x": torch.randn(rows, T, D), "weight": torch.randn(D, 4), "bias": torch.randn(D)}
    return {**x, "state": torch.randn(rows, D, 3)} if with_state else x


def elementwise(*names: str, **fixed: Tensor) -> Callable[..., Tensors]:
    def make(*_: object) -> Tensors:
        vectors = {"weight": (D,)}
        return {**{name: torch.randn(*vectors.get(name, (B, T, D))) for name in names}, **fixed}

    return make


TARGET = torch.arange(T) % 50


def loss_inputs(*_: object) -> Tensors:
    return {"hidden": torch.randn(T, D), "head": torch.randn(50, D)}


def logits_inputs(*_: object) -> Tensors:
    return {"logits": torch.randn(T, 50) * 3}


def gate_inputs(*_: object) -> Tensors:
    return {"a": torch.randn(B, T, 8), "A_log": torch.randn(8), "dt_bias": torch.randn(8)}


@dataclass
class Operator:
    name: str
    inputs: Callable[..., Tensors]
    ours: Callable[..., list[Tensor]]
    plain: Callable[[Tensors], list[Tensor]]
    columns: tuple[str, ...] = ("forward", "backward")
    fp32: tuple[str, ...] = ()
    """Inputs that are fp32 at every precision."""
    by_token: tuple[str, ...] = ()
    """Inputs with a dimension of tokens, which packing cuts."""


def operators() -> list[Operator]:
    gdn = torch.ops.gdn
    rule = {"columns": COLUMNS, "fp32": ("g", "beta", "state"),
            "by_token": ("q", "k", "v", "g", "beta")}  # fmt: skip
    names = ("chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule")
    return [
        *(Operator(name, rule_inputs, our_rule(name), plain_rule, **rule) for name in names),
        Operator("causal_conv1d", convolution_inputs, our_convolution, plain_convolution,
                 ("forward", "backward", "varlen", "state"), by_token=("x",)),
        Operator("rms_norm", elementwise("x", "weight"),
                 lambda x: [gdn.rms_norm(x["x"], x["weight"], 1e-5)],
                 lambda x: [functional.rms_norm(x["x"], (D,), x["weight"], 1e-5)]),
        Operator("rms_norm_gated", elementwise("x", "gate", "weight"),
                 lambda x: [gdn.rms_norm_gated(x["x"], x["gate"], x["weight"], 1e-5)],
                 lambda x: [functional.rms_norm(x["x"], (D,), x["weight"], 1e-5)
                            * functional.silu(x["gate"])]),
        Operator("l2_norm", elementwise("x"), lambda x: [gdn.l2_norm(x["x"])],
                 lambda x: [plain_l2(x["x"])]),
        Operator("swiglu", elementwise("gate", "up"), lambda x: [gdn.swiglu(x["gate"], x["up"])],
                 lambda x: [functional.silu(x["gate"]) * x["up"]]),
        Operator("cross_entropy", logits_inputs,
                 lambda x: [gdn.cross_entropy(x["logits"], TARGET.to(x["logits"].device))],
                 lambda x: [functional.cross_entropy(wide(x["logits"]), TARGET)]),
        Operator("linear_cross_entropy", loss_inputs,
                 lambda x: [gdn.linear_cross_entropy(x["hidden"], x["head"],
                                                      TARGET.to(x["hidden"].device))],
                 lambda x: [functional.cross_entropy(wide(x["hidden"] @ x["head"].T), TARGET)]),
        Operator("gated_delta_rule_gate", gate_inputs,
                 lambda x: [gdn.gated_delta_rule_gate(x["a"], x["A_log"], x["dt_bias"])],
                 lambda x: [-x["A_log"].exp() * functional.softplus(wide(x["a"]) + x["dt_bias"])],
                 fp32=("A_log", "dt_bias")),
    ]  # fmt: skip


def in_pieces(function: Callable[[Tensors], list[Tensor]], by_token: tuple[str, ...]):
    """The function on each packed sequence by itself."""

    def run(x: Tensors) -> list[Tensor]:
        pieces = []
        for n, (begin, end) in enumerate(itertools.pairwise(ENDS)):
            if begin == end:
                continue
            cut = {name: x[name][:, begin:end] for name in by_token}
            state = {"state": x["state"][n : n + 1]} if "state" in x else {}
            pieces.append(function({**x, **cut, **state}))
        return [torch.cat([piece[0] for piece in pieces], 1)]

    return run


def results(function, x: Tensors, gradients: bool) -> list[Tensor]:
    """What the function returns, or else the gradients of all inputs."""
    leaves = {name: tensor.detach().requires_grad_(gradients) for name, tensor in x.items()}
    outputs = [y for y in function(leaves) if y.requires_grad or not gradients]
    if not gradients:
        return outputs
    generator = torch.Generator().manual_seed(1)
    directions = [torch.randn(y.shape, generator=generator).to(y.dtype) for y in outputs]
    return list(torch.autograd.grad(outputs, list(leaves.values()), directions))


def largest_error(found: list[Tensor], exact: list[Tensor]) -> float:
    errors = []
    for ours, theirs in zip(found, exact, strict=True):
        errors.append(float((ours.double() - theirs).norm() / theirs.norm()))
    return max(errors)


def on(device: str, function: Callable[..., list[Tensor]]) -> Callable[..., list[Tensor]]:
    """The function on a device, between tensors on the CPU."""

    def run(x: Tensors, *options: Tensor) -> list[Tensor]:
        moved = {name: tensor.to(device) for name, tensor in x.items()}
        return [y.cpu() for y in function(moved, *(option.to(device) for option in options))]

    return run


def measure(
    operator: Operator, dtype: torch.dtype, column: str, device: str = "cpu"
) -> tuple[float, float]:
    """Our error on a device, and plain PyTorch's on the CPU."""
    torch.manual_seed(0)
    packed = column == "varlen"
    x = operator.inputs(1 if packed else B, 2 * H if column == "GVA" else H, column == "state")
    x = {name: t if name in operator.fp32 else t.to(dtype) for name, t in x.items()}
    on_device, plain = on(device, operator.ours), operator.plain
    ours = on_device
    if packed:
        plain = in_pieces(operator.plain, operator.by_token)
        ours = lambda x: on_device(x, torch.tensor(ENDS))[:1]  # noqa: E731
    exact = {name: t.double() for name, t in x.items()}
    errors = [0.0, 0.0]
    for gradients in {"forward": (False,), "backward": (True,)}.get(column, (False, True)):
        reference = results(plain, exact, gradients)
        for i, function in enumerate((ours, plain)):
            error = largest_error(results(function, x, gradients), reference)
            errors[i] = max(errors[i], error)
    return errors[0], errors[1]


def main(device: str) -> None:
    print("Error against fp64, ours / plain PyTorch's:\n")
    print("| operator | precision | " + " | ".join(COLUMNS) + " |")
    print("| --- " * (len(COLUMNS) + 2) + "|")
    for operator in operators():
        for dtype in DTYPES:
            cells = []
            for column in COLUMNS:
                if column in operator.columns:
                    ours, plain = measure(operator, dtype, column, device)
                    cells.append(f"{ours:.1e} / {plain:.1e}")
                else:
                    cells.append("")
            name = str(dtype).removeprefix("torch.")
            print(f"| {operator.name} | {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", help="libgdn_ops.so, instead of the installed package's")
    parser.add_argument("--device", default="cpu", help="where ours computes (default: cpu)")
    arguments = parser.parse_args()
    if library := arguments.library:
        os.environ["GDN_OPS_LIBRARY"] = library
    import gated_deltanet  # noqa: F401 (registers the operators)

    main(arguments.device)
