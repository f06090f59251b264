"""Gated DeltaNet's part of flash-linear-attention's interface, served by gated_deltanet.

`fla.layers`, `fla.models`, `fla.modules`, `fla.ops` and `fla.ops.gated_delta_rule` re-export what
gated_deltanet has under the same names. Nothing is computed here.
"""

from gated_deltanet_drop_in import refuse_to_shadow

refuse_to_shadow("fla", "flash-linear-attention", "fla-core")

# The release of flash-linear-attention whose names and arguments these are. transformers asks for
# 0.2.2 or newer.
__version__ = "0.6.0"
