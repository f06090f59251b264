"""RMS normalisation with a learned scale."""

import torch
from torch import Tensor, nn

from gated_deltanet.ops.common import add_rms_norm, rms_norm, rms_norm_gated


class RMSNorm(nn.Module):
    """x * rsqrt(mean(x^2) + eps) * weight over the last dimension (arXiv 1910.07467).

    Args:
        size: of the last dimension.
        eps: added to the mean square.
        fused: our operator; otherwise torch's `rms_norm`.
    """

    def __init__(self, size: int, eps: float = 1e-5, fused: bool = True) -> None:
        super().__init__()
        self.size, self.eps, self.fused = size, eps, fused
        self.weight = nn.Parameter(torch.ones(size))

    def forward(
        self, x: Tensor, residual: Tensor | None = None, prenorm: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The norm of x + residual, [..., size] in its dtype; with prenorm also that sum."""
        if residual is not None and self.fused:
            y, x = add_rms_norm(x, residual, self.weight, self.eps)
        else:
            x = x if residual is None else x + residual
            y = self._norm(x)
        return (y, x) if prenorm else y

    def _norm(self, x: Tensor) -> Tensor:
        if self.fused:
            return rms_norm(x, self.weight, self.eps)
        return nn.functional.rms_norm(x, (self.size,), self.weight.to(x.dtype), self.eps)

    def extra_repr(self) -> str:
        return f"{self.size}, eps={self.eps}, fused={self.fused}"


class FusedRMSNormGated(nn.Module):
    """RMSNorm(x) * silu(gate): the output norm of Gated DeltaNet.

    Args:
        size: of the last dimension.
        eps: added to the mean square.
    """

    def __init__(self, size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.size, self.eps = size, eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """x and gate [..., size] -> [..., size], in x's dtype."""
        return rms_norm_gated(x, gate, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.size}, eps={self.eps}"
