"""Building blocks with parameters, over the operators."""

from gated_deltanet.modules.autocast import cast_for_autocast
from gated_deltanet.modules.gated_mlp import GatedMLP
from gated_deltanet.modules.loss import causal_lm_loss, next_token_targets
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
    "causal_lm_loss",
    "next_token_targets",
]
