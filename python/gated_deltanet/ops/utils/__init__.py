"""Padded batches as packed sequences, and the one way to reject an argument."""

from gated_deltanet.ops.utils.check import check_shape, describe, reject
from gated_deltanet.ops.utils.packing import (
    Unpadding,
    check_cu_seqlens,
    find_padding,
    longest_sequence,
)

__all__ = [
    "Unpadding",
    "check_cu_seqlens",
    "check_shape",
    "describe",
    "find_padding",
    "longest_sequence",
    "reject",
]
