"""The operators, those of gated_deltanet.ops."""

from gated_deltanet.ops import *  # noqa: F403
from gated_deltanet.ops import __all__ as __all__
