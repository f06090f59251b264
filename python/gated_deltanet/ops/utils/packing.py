"""Padded batches as packed sequences, and back."""

from dataclasses import dataclass

import torch
from torch import Tensor

from gated_deltanet.ops.utils.check import reject


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
