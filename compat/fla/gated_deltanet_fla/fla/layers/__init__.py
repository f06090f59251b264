"""Token mixers, those of gated_deltanet.layers."""

from gated_deltanet.layers import *  # noqa: F403
from gated_deltanet.layers import __all__ as __all__
