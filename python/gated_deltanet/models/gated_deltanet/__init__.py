"""Gated DeltaNet language models."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from gated_deltanet.models.gated_deltanet.cache import GatedDeltaNetCache
from gated_deltanet.models.gated_deltanet.configuration import GatedDeltaNetConfig
from gated_deltanet.models.gated_deltanet.modeling import (
    GatedDeltaNetForCausalLM,
    GatedDeltaNetModel,
)

# flash-linear-attention registers the same type: the one that is imported last has it.
AutoConfig.register(GatedDeltaNetConfig.model_type, GatedDeltaNetConfig, exist_ok=True)
AutoModel.register(GatedDeltaNetConfig, GatedDeltaNetModel, exist_ok=True)
AutoModelForCausalLM.register(GatedDeltaNetConfig, GatedDeltaNetForCausalLM, exist_ok=True)

__all__ = [
    "GatedDeltaNetCache",
    "GatedDeltaNetConfig",
    "GatedDeltaNetForCausalLM",
    "GatedDeltaNetModel",
]
