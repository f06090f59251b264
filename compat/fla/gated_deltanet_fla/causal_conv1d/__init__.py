"""The functions of causal-conv1d that transformers' models call, served by gated_deltanet."""

from gated_deltanet_drop_in import refuse_to_shadow

refuse_to_shadow("causal_conv1d", "causal-conv1d")

from causal_conv1d.interface import causal_conv1d_fn, causal_conv1d_update  # noqa: E402

__all__ = ["causal_conv1d_fn", "causal_conv1d_update"]
# The release of causal-conv1d whose names and arguments these are.
__version__ = "1.6.0"
