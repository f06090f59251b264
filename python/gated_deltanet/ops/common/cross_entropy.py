"""Cross-entropy of next-token prediction, without intermediate tensors of the logits' size."""

import torch
from torch import Tensor

import gated_deltanet._library  # noqa: F401 (registers the operators)

IGNORE_INDEX = -100


def cross_entropy(
    logits: Tensor, target: Tensor, ignore_index: int = IGNORE_INDEX, reduction: str = "mean"
) -> Tensor:
    """-log softmax(logits)[target].

    Args:
        logits: [M, vocabulary] in fp32, bf16, fp16 or fp64.
        target: [M] int64. Rows of `ignore_index` count nothing.
        ignore_index: see target.
        reduction: "mean" over the counted rows (0 with none counted), "sum" or "none".

    Returns:
        fp32 (fp64 for fp64), a scalar, or [M] for "none"; differentiable in logits.

    Raises:
        ValueError: naming the argument, what was expected and what came; on a CPU also for a target
            outside [0, vocabulary). On a GPU, where looking would be waiting, such a target makes
            the loss and the gradient of its row NaN, and harms nothing else.
    """
    return torch.ops.gdn.cross_entropy(logits, target, ignore_index, reduction)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    ignore_index: int = IGNORE_INDEX,
    reduction: str = "mean",
    rows_per_block: int = 1024,
) -> Tensor:
    """cross_entropy(hidden @ weight.T, target), with the logits of a few rows at a time.

    Args:
        hidden: [M, D].
        weight: [vocabulary, D], dtype of hidden or fp32.
        target: [M] int64. Rows of `ignore_index` count nothing.
        ignore_index: see target.
        reduction: "mean", "sum" or "none".
        rows_per_block: rows whose logits are in memory at a time.

    Returns:
        As `cross_entropy`; differentiable in hidden and weight.

    Raises:
        ValueError: as `cross_entropy`.
    """
    return torch.ops.gdn.linear_cross_entropy(
        hidden, weight, target, ignore_index, reduction, rows_per_block
    )
