"""The operators: thin typed functions over `torch.ops.gdn`."""

from gated_deltanet.ops.common import (
    add_rms_norm,
    causal_conv1d,
    causal_conv1d_update,
    cross_entropy,
    l2_norm,
    linear_cross_entropy,
    linears,
    rms_norm,
    rms_norm_gated,
    swiglu,
    swiglu_linear,
)
from gated_deltanet.ops.gated_delta_rule import (
    chunk_gated_delta_rule,
    fused_recurrent_gated_delta_rule,
    fused_recurrent_gated_delta_rule_update,
    gated_delta_rule_gate,
)

__all__ = [
    "add_rms_norm",
    "causal_conv1d",
    "causal_conv1d_update",
    "chunk_gated_delta_rule",
    "cross_entropy",
    "fused_recurrent_gated_delta_rule",
    "fused_recurrent_gated_delta_rule_update",
    "gated_delta_rule_gate",
    "l2_norm",
    "linear_cross_entropy",
    "linears",
    "rms_norm",
    "rms_norm_gated",
    "swiglu",
    "swiglu_linear",
]
