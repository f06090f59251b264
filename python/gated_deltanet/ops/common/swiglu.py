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
