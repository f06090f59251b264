"""Padded batches as packed sequences, and back."""

from dataclasses import dataclass

import torch
from torch import Tensor

from gated_deltanet.ops.utils.check import reject


def check_cu_seqlens(owner: str, cu_seqlens: Tensor, B: int, T: int) -> Tensor:
    """cu_seqlens [N + 1] on the CPU, checked; in a compiled graph, as it is.

    There values cannot be read, and the operators reject bad ones when the graph runs.

    Raises:
        ValueError: unless it is int64 or int32, B is 1, and the boundaries start at 0, never
            decrease and end at T.
    """
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype not in (torch.int64, torch.int32):
        reject(owner, "cu_seqlens", "int64 or int32 of shape [N + 1]", cu_seqlens)
    if B != 1:
        reject(owner, "cu_seqlens", "None for a batch of several rows", f"B = {B}")
    if torch.compiler.is_compiling():
        return cu_seqlens
    cu_seqlens = cu_seqlens.cpu()
    values = cu_seqlens.tolist()
    if not values or values[0] != 0 or values[-1] != T or values != sorted(values):
        expected = f"boundaries that start at 0, never decrease and end at T = {T}"
        reject(owner, "cu_seqlens", expected, values)
    return cu_seqlens


def longest_sequence(cu_seqlens: Tensor) -> int:
    """Tokens of the longest packed sequence."""
    return int(cu_seqlens.diff().max())


@dataclass
class Unpadding:
    """Where the tokens of a left-padded batch are."""

    B: int
    T: int
    indices: Tensor
    """[tokens] int64 on the mask's device, into the B * T positions."""
    cu_seqlens: Tensor
    """[B + 1] int64 on the CPU."""

    def unpad(self, x: Tensor) -> Tensor:
        """[B, T, ...] -> [1, tokens, ...]."""
        return x.flatten(0, 1).index_select(0, self.indices).unsqueeze(0)

    def repad(self, x: Tensor) -> Tensor:
        """[1, tokens, ...] -> [B, T, ...], 0 at padding."""
        padded = x.new_zeros(self.B * self.T, *x.shape[2:])
        return padded.index_copy(0, self.indices, x.squeeze(0)).unflatten(0, (self.B, self.T))


def find_padding(owner: str, attention_mask: Tensor, B: int, T: int) -> Unpadding | None:
    """Nothing when the last T columns of the mask have no padding.

    Args:
        owner: for messages.
        attention_mask: [B, T], or [B, past + T] as transformers passes it beside a cache; 1 for
            tokens, and 0 for padding, on the left only.
        B: rows.
        T: tokens a row.

    Raises:
        ValueError: for another shape, or padding that is not on the left.
    """
    if attention_mask.dim() != 2 or attention_mask.shape[0] != B or attention_mask.shape[1] < T:
        reject(owner, "attention_mask", f"of shape [B, T] = [{B}, {T}]", attention_mask)
    mask = attention_mask[:, attention_mask.shape[1] - T :] != 0
    if bool(mask.all()):
        return None
    if bool((mask[:, :-1] & ~mask[:, 1:]).any()):
        reject(owner, "attention_mask", "0 for padding on the left, then 1", "a 0 after a 1")
    lengths = mask.sum(1).cpu()
    return Unpadding(
        B,
        T,
        mask.flatten().nonzero().squeeze(1),
        torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]),
    )
