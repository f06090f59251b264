"""Operators that the layers of every linear-attention model need."""

from gated_deltanet.ops.common.causal_conv1d import causal_conv1d, causal_conv1d_update
from gated_deltanet.ops.common.cross_entropy import cross_entropy, linear_cross_entropy
from gated_deltanet.ops.common.linears import linears
from gated_deltanet.ops.common.norm import add_rms_norm, l2_norm, rms_norm, rms_norm_gated
from gated_deltanet.ops.common.swiglu import swiglu, swiglu_linear

__all__ = [
    "add_rms_norm",
    "causal_conv1d",
    "causal_conv1d_update",
    "cross_entropy",
    "l2_norm",
    "linear_cross_entropy",
    "linears",
    "rms_norm",
    "rms_norm_gated",
    "swiglu",
    "swiglu_linear",
]
