"""The gated activation of the MLP (arXiv 2002.05202)."""

import torch
from torch import Tensor

import gated_deltanet._library  # noqa: F401 (registers the operators)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, elementwise; gate and up of one shape and dtype; differentiable in both.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    return torch.ops.gdn.swiglu(gate, up)


def swiglu_linear(gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
    """swiglu(gate, up) @ weight.T; the backward computes the activation again, and keeps none.

    Args:
        gate, up: [..., D], of one shape and dtype.
        weight: [out_features, D], of their dtype (or any, under autocast).

    Returns:
        [..., out_features].
    """
    return torch.ops.gdn.swiglu_linear(gate, up, weight)
