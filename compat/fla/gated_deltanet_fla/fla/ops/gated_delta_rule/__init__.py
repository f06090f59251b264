"""The gated delta rule, that of gated_deltanet.ops.gated_delta_rule."""

from gated_deltanet.ops.gated_delta_rule import *  # noqa: F403
from gated_deltanet.ops.gated_delta_rule import __all__ as __all__
