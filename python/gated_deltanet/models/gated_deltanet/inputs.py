"""Checks of what callers, and transformers itself, pass to a model."""

from typing import Any

import torch
from torch import Tensor

from gated_deltanet.ops.utils import check_cu_seqlens, check_shape, reject

# What transformers' collators for packed sequences pass besides position_ids.
FLATTENING_KEYS = frozenset(
    {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}
)


def refuse_unknown(owner: str, kwargs: dict[str, Any], known: frozenset[str]) -> None:
    """Raises TypeError unless every keyword argument is known."""
    if unknown := sorted(set(kwargs) - known):
        raise TypeError(f"{owner}: unknown keyword argument {unknown[0]!r}")


def check_ids(
    owner: str, argument: str, ids: Tensor, vocab_size: int, also: int | None = None
) -> None:
    """Rejects ids that are not int64 [B, T] or, on a CPU, outside the vocabulary.

    Args:
        owner: for messages.
        argument: for messages.
        ids: what is checked.
        vocab_size: ids must be from 0 to vocab_size - 1,
        also: or this.
    """
    check_shape(owner, argument, ids, (-1, -1), "[B, T]")
    if ids.dtype not in (torch.int64, torch.int32):
        reject(owner, argument, "int64", ids)
    # Values are neither read in a compiled graph nor waited for on a GPU; look-ups assert there.
    if torch.compiler.is_compiling() or ids.device.type != "cpu" or ids.numel() == 0:
        return
    outside = (ids < 0) | (ids >= vocab_size)
    if also is not None:
        outside &= ids != also
    if bool(outside.any()):
        expected = f"from 0 to vocab_size - 1 = {vocab_size - 1}"
        reject(owner, argument, expected, int(ids[outside][0]))


def packed_boundaries(
    owner: str,
    cu_seqlens: Tensor | None,
    kwargs: dict[str, Any],
    position_ids: Tensor | None,
    B: int,
    T: int,
) -> Tensor | None:
    """The boundaries [N + 1] of packed sequences, or None where there is one sequence a row.

    They are cu_seqlens, or transformers' cu_seq_lens_q in kwargs, or else where positions [B, T]
    start anew.

    Raises:
        ValueError: for boundaries that cannot be, and where positions start anew in one row of
            several: packed sequences are one row.
    """
    if cu_seqlens is None:
        cu_seqlens = kwargs.get("cu_seq_lens_q")
    if cu_seqlens is not None:
        return check_cu_seqlens(owner, cu_seqlens, B, T)
    if position_ids is None or T < 2:
        return None
    check_shape(owner, "position_ids", position_ids, (-1, T), "[B, T]")
    starts = position_ids[:, 1:] != position_ids[:, :-1] + 1
    if not bool(starts.any()):
        return None
    if B != 1:
        reject(owner, "position_ids", "consecutive in each row where B > 1", position_ids)
    inner = starts[0].nonzero().squeeze(1) + 1
    return torch.cat([inner.new_zeros(1), inner, inner.new_full((1,), T)])
