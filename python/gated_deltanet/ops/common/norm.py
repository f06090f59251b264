"""Normalisations over the last dimension: statistics in fp32, results in the input's dtype."""

import torch
from torch import Tensor

import gated_deltanet._library  # noqa: F401 (registers the operators)


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """x * rsqrt(mean(x^2) + eps) * weight (arXiv 1910.07467).

    Args:
        x: [..., D] in fp32, bf16, fp16 or fp64.
        weight: [D] in x's dtype or fp32. Default: ones.
        eps: added to the mean square.

    Returns:
        Like x; differentiable in x and weight.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    return torch.ops.gdn.rms_norm(x, weight, eps)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """rms_norm of x + residual, and that sum: a residual connection and its norm in one pass.

    Args:
        x: [..., D].
        residual: shape and dtype of x (under autocast any dtype).
        weight: [D] in x's dtype or fp32. Default: ones.
        eps: added to the mean square.

    Returns:
        The norm and the sum; differentiable in x, residual and weight.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    return torch.ops.gdn.add_rms_norm(x, residual, weight, eps)


def rms_norm_gated(
    x: Tensor, gate: Tensor, weight: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """rms_norm(x, weight, eps) * silu(gate): the output norm of Gated DeltaNet.

    Args:
        x: [..., D].
        gate: shape and dtype of x.
        weight: [D] in x's dtype or fp32. Default: ones.
        eps: added to the mean square.

    Returns:
        Like x; differentiable in x, gate and weight.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    return torch.ops.gdn.rms_norm_gated(x, gate, weight, eps)


def l2_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x * rsqrt(sum(x^2) + eps), over the last dimension of x [..., D]; differentiable."""
    return torch.ops.gdn.l2_norm(x, eps)
