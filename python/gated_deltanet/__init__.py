"""Gated DeltaNet (arXiv 2412.06464): operators, layers and Hugging Face models.

Every computation is an operator of `torch.ops.gdn`, compiled ahead of time; this package holds
parameters and calls them. Importing it touches no GPU. What needs transformers is imported when it
is first asked for; `import gated_deltanet.models` also registers the model with transformers' Auto
classes.
"""

import importlib
from typing import TYPE_CHECKING, Any

from gated_deltanet import _library
from gated_deltanet.layers import Attention, GatedDeltaNet
from gated_deltanet.ops import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule

if TYPE_CHECKING:
    from gated_deltanet.models import (
        GatedDeltaNetCache,
        GatedDeltaNetConfig,
        GatedDeltaNetForCausalLM,
        GatedDeltaNetModel,
    )

__version__ = _library.version()

_MODELS = (
    "GatedDeltaNetCache",
    "GatedDeltaNetConfig",
    "GatedDeltaNetForCausalLM",
    "GatedDeltaNetModel",
)

__all__ = [  # noqa: RUF022 (by layer of the package, lowest first)
    "chunk_gated_delta_rule",
    "fused_recurrent_gated_delta_rule",
    "Attention",
    "GatedDeltaNet",
    "GatedDeltaNetCache",
    "GatedDeltaNetConfig",
    "GatedDeltaNetForCausalLM",
    "GatedDeltaNetModel",
]


def __getattr__(name: str) -> Any:
    if name in _MODELS:
        return getattr(importlib.import_module("gated_deltanet.models"), name)
    raise AttributeError(f"module 'gated_deltanet' has no attribute '{name}'")
