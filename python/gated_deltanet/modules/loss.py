"""The loss of next-token prediction."""

import torch
from torch import Tensor, nn

from gated_deltanet.modules.autocast import cast_for_autocast
from gated_deltanet.ops.common import cross_entropy, linear_cross_entropy
from gated_deltanet.ops.common.cross_entropy import IGNORE_INDEX


def next_token_targets(labels: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """The token that each position predicts: labels [B, T] one step to the left.

    IGNORE_INDEX (-100) after a row's last token and, with cu_seqlens [N + 1], after the last token
    of each packed sequence.
    """
    targets = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    if cu_seqlens is not None:
        ends = cu_seqlens.to(labels.device, torch.int64)
        last = ends[ends > 0] - 1  # an empty first sequence ends at 0
        targets = targets.index_fill(1, last, IGNORE_INDEX)
    return targets


def token_cross_entropy(
    logits: Tensor, targets: Tensor, fused: bool = True, count: Tensor | int | None = None
) -> Tensor:
    """Mean cross-entropy, a scalar fp32.

    Args:
        logits: [M, vocabulary].
        targets: [M] int64; IGNORE_INDEX (-100) counts nothing.
        fused: our operator; otherwise torch's, in fp32.
        count: what the sum is divided by; the number of counted targets when absent. Trainer gives
            that of all batches of one step.
    """
    reduction = "mean" if count is None else "sum"
    if fused:
        loss = cross_entropy(logits, targets, reduction=reduction)
    else:
        loss = nn.functional.cross_entropy(
            logits.float(), targets, ignore_index=IGNORE_INDEX, reduction=reduction
        )
    return loss if count is None else loss / count


def token_linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, count: Tensor | int | None = None
) -> Tensor:
    """token_cross_entropy of hidden [M, D] and the projection's weight [vocabulary, D].

    The logits of a few rows at a time are held; in autocast's dtype where autocast is on.
    """
    reduction = "mean" if count is None else "sum"
    loss = linear_cross_entropy(
        cast_for_autocast(hidden),
        cast_for_autocast(weight),
        targets,
        reduction=reduction,
        rows_per_block=4096 if hidden.is_cuda else 1024,  # a GPU needs larger products
    )
    return loss if count is None else loss / count
