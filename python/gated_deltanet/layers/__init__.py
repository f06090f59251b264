"""Token mixers: Gated DeltaNet, and attention for hybrid models."""

from gated_deltanet.layers.attention import Attention
from gated_deltanet.layers.cache import LayerCache
from gated_deltanet.layers.gated_deltanet import GatedDeltaNet

__all__ = ["Attention", "GatedDeltaNet", "LayerCache"]
