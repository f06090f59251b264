"""Building blocks with parameters, over the operators."""

from gated_deltanet.modules.autocast import cast_for_autocast
from gated_deltanet.modules.gated_mlp import GatedMLP
from gated_deltanet.modules.loss import (
    next_token_targets,
    token_cross_entropy,
    token_linear_cross_entropy,
)
from gated_deltanet.modules.norm import FusedRMSNormGated, RMSNorm
from gated_deltanet.modules.rotary import RotaryEmbedding
from gated_deltanet.modules.short_convolution import ShortConvolution

__all__ = [
    "FusedRMSNormGated",
    "GatedMLP",
    "RMSNorm",
    "RotaryEmbedding",
    "ShortConvolution",
    "cast_for_autocast",
    "next_token_targets",
    "token_cross_entropy",
    "token_linear_cross_entropy",
]
