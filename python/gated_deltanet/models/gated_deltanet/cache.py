"""What a model carries from one call to the next: constant in size for Gated DeltaNet layers."""

from typing import Any

from torch import Tensor
from transformers import Cache

from gated_deltanet.layers import LayerCache


class GatedDeltaNetCache(Cache):
    """One LayerCache a layer. A new cache is empty, and the first forward fills it.

    `generate` makes one, and returns it as `past_key_values`; given back to a later call, with the
    whole text so far as input, it spares reading that again.

    Examples:
        >>> import torch
        >>> from gated_deltanet import GatedDeltaNetCache, GatedDeltaNetConfig
        >>> from gated_deltanet import GatedDeltaNetForCausalLM
        >>> config = GatedDeltaNetConfig(hidden_size=32, num_hidden_layers=1, num_heads=1,
        ...                              head_dim=16, vocab_size=100)
        >>> model, cache = GatedDeltaNetForCausalLM(config).eval(), GatedDeltaNetCache()
        >>> with torch.no_grad():
        ...     prompt = model(torch.tensor([[5, 6, 7]]), past_key_values=cache)
        ...     following = model(torch.tensor([[8]]), past_key_values=cache)
        >>> cache.get_seq_length()
        4
    """

    layers: list[LayerCache]  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.seen_tokens = 0
        """Tokens of each row so far, padding included."""
        self.step: Any = None
        """Of decoding.py: the step for these tensors, the tensors of the last token, or why there
        is no step."""

    def layer_cache(self, layer_idx: int) -> LayerCache:
        """The part of one layer, made when first asked for."""
        while len(self.layers) <= layer_idx:
            self.layers.append(LayerCache())
        return self.layers[layer_idx]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of each row so far, padding included; the same for every layer."""
        return self.seen_tokens

    def nbytes(self) -> int:
        """Bytes of all tensors in it."""
        return sum(layer.nbytes() for layer in self.layers)

    @property
    def batch_size(self) -> int:
        """Rows, or -1 while empty."""
        return self.layers[0].batch_size if self.layers else -1

    def reset(self) -> None:
        """Back to empty."""
        super().reset()
        self.seen_tokens = 0
        self.step = None

    def select_rows(self, index: Tensor) -> None:
        """Keeps the batch rows `index` [B'] int64, in that order."""
        self.batch_select_indices(index)
