"""Linear layers called through fused operators, where nothing else hangs on them."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gated_deltanet.ops.common import linears


def is_plain(layer: nn.Module) -> bool:
    """Whether its weight says all: no adapter in its place (LoRA, say), no bias, no hooks."""
    return (
        type(layer) is nn.Linear
        and layer.bias is None
        and not (layer._forward_hooks or layer._forward_pre_hooks)
        and not (layer._backward_hooks or layer._backward_pre_hooks)
    )


def apply(layer: nn.Module, x: Tensor) -> Tensor:
    """layer(x). 16 bits on the CPU by the operator that multiplies them as suits the processor."""
    if x.device.type != "cpu":
        return layer(x)
    low = x.dtype in (torch.bfloat16, torch.float16) or torch.is_autocast_enabled("cpu")
    return project(x, [layer])[0] if low else layer(x)


def project(x: Tensor, layers: Sequence[nn.Module]) -> list[Tensor]:
    """layer(x) for each layer."""
    if all(map(is_plain, layers)):
        return linears(x, [layer.weight for layer in layers])
    return [layer(x) for layer in layers]
