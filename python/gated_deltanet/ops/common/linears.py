"""Several linear layers of one input."""

from collections.abc import Sequence

import torch
from torch import Tensor

import gated_deltanet._library  # noqa: F401 (registers the operators)


def linears(x: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """x @ weight.T for each weight: the same as so many linear layers without bias.

    Small ones share a product, and the gradient of x is summed inside the products instead of
    beside them.

    Args:
        x: [..., D].
        weights: each [out_features, D], of x's dtype (under autocast of any).

    Returns:
        For each weight [..., out_features].

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    return torch.ops.gdn.linears(x, list(weights))
