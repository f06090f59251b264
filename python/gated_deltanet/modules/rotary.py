"""Rotary position embedding (arXiv 2104.09864), pairing dimension i with i + D/2."""

import torch
from torch import Tensor

from gated_deltanet.ops.utils import reject


class RotaryEmbedding:
    """Rotates by position; it has no parameters and keeps no table, so any position will do.

    Args:
        head_dim: D, even.
        base: of the geometric series of frequencies.
    """

    def __init__(self, head_dim: int, base: float = 10000.0) -> None:
        if head_dim <= 0 or head_dim % 2 != 0:
            reject("RotaryEmbedding", "head_dim", "positive and even", head_dim)
        self.head_dim, self.base = head_dim, base

    def angles(self, positions: Tensor) -> Tensor:
        """positions [B or 1, T] int64 -> position * base^(-2i/D), [B or 1, T, 1, D/2] fp64.

        fp32 loses the angle of far positions.
        """
        double = torch.float64
        exponents = torch.arange(0, self.head_dim, 2, dtype=double, device=positions.device)
        frequencies = self.base ** (exponents / -self.head_dim)
        return (positions.to(double).unsqueeze(-1) * frequencies).unsqueeze(2)

    @staticmethod
    def rotate(x: Tensor, angles: Tensor) -> Tensor:
        """x [B, T, heads, D] turned by angles(), computed in fp32, in x's dtype."""
        compute = torch.float64 if x.dtype == torch.float64 else torch.float32
        cos, sin = angles.cos().to(compute), angles.sin().to(compute)
        first, second = x.to(compute).chunk(2, -1)
        turned = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
        return turned.to(x.dtype)
