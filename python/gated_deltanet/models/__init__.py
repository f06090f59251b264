"""Models for transformers; importing this registers them with its Auto classes."""

from gated_deltanet.models.gated_deltanet import (
    GatedDeltaNetCache,
    GatedDeltaNetConfig,
    GatedDeltaNetForCausalLM,
    GatedDeltaNetModel,
)

__all__ = [
    "GatedDeltaNetCache",
    "GatedDeltaNetConfig",
    "GatedDeltaNetForCausalLM",
    "GatedDeltaNetModel",
]
