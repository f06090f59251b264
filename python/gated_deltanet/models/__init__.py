"""Models for transformers; importing this registers them with its Auto classes."""

from gated_deltanet.models.gated_deltanet import (
    GatedDeltaNetCache,
    GatedDeltaNetConfig,
    GatedDeltaNetForCausalLM,
    GatedDeltaNetModel,
)
from gated_deltanet.models.gated_norms import fuse_gated_norms

__all__ = [
    "GatedDeltaNetCache",
    "GatedDeltaNetConfig",
    "GatedDeltaNetForCausalLM",
    "GatedDeltaNetModel",
    "fuse_gated_norms",
]
