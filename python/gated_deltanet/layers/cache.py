"""What one layer carries from one call to the next when decoding."""

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from gated_deltanet.ops.utils import reject


@dataclass
class LayerCache:
    """A new one is empty, and the first forward fills it.

    A Gated DeltaNet layer uses the first four tensors, an attention layer the others. It is also a
    layer of transformers' `Cache`: the methods and the last attributes are what that asks for.
    """

    recurrent_state: Tensor | None = None
    """[B, HV, K, V] fp32."""
    conv_q: Tensor | None = None
    """[B, H * K, W - 1]; None without short convolution."""
    conv_k: Tensor | None = None
    """[B, H * K, W - 1]."""
    conv_v: Tensor | None = None
    """[B, HV * V, W - 1]."""
    attn_key: Tensor | None = None
    """[B, kv heads, tokens, head dim], of a window only the last window - 1 tokens. Rows with fewer
    start with zeros: all end together."""
    attn_value: Tensor | None = None
    """Like attn_key."""
    attn_tokens: Tensor | None = None
    """[B] int64 on the CPU: tokens of each row so far."""

    is_compileable = False
    is_croppable = False  # a state cannot forget its last tokens
    is_sliding = False
    supports_early_init = False

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are there, by name."""
        named = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {name: tensor for name, tensor in named if tensor is not None}

    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    @property
    def batch_size(self) -> int:
        """B, or -1 while empty."""
        return next((tensor.shape[0] for tensor in self.tensors().values()), -1)

    def reset(self) -> None:
        """Back to empty."""
        for name in self.tensors():
            setattr(self, name, None)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the rows `indices` [B'] int64, in that order."""
        for name, tensor in self.tensors().items():
            setattr(self, name, tensor.index_select(0, indices.to(tensor.device)))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """batch_select_indices, under the name that beam search calls."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times."""
        for name, tensor in self.tensors().items():
            setattr(self, name, tensor.repeat_interleave(repeats, 0))

    def crop(self, tokens_to_remove: int) -> None:
        """Raises ValueError unless `tokens_to_remove` is 0."""
        if tokens_to_remove != 0:
            reject("LayerCache", "tokens_to_remove", "0: states keep no history", tokens_to_remove)

    def get_max_length(self) -> int:
        """-1: no limit."""
        return -1


def layer_cache(owner: str, past_key_values: Any, layer_idx: int | None) -> LayerCache | None:
    """The layer's part of a model's cache, or a LayerCache itself; None without a cache.

    Raises:
        ValueError: for the cache of another model class, or a layer without an index.
    """
    if past_key_values is None or isinstance(past_key_values, LayerCache):
        return past_key_values
    if not hasattr(past_key_values, "layer_cache"):
        expected = "a GatedDeltaNetCache, a LayerCache or None"
        reject(owner, "past_key_values", expected, type(past_key_values).__name__)
    if layer_idx is None:
        reject(owner, "layer_idx", "given to a layer that is called with a model's cache", None)
    return past_key_values.layer_cache(layer_idx)


def check_cached(owner: str, name: str, tensor: Tensor | None, sizes: tuple[int, ...]) -> None:
    """Rejects a cached tensor that is there and not of these sizes."""
    if tensor is not None and tensor.shape != torch.Size(sizes):
        expected = f"that of this layer and batch, with {name} {list(sizes)}"
        reject(owner, "past_key_values", expected, tensor)
