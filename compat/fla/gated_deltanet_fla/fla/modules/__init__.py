"""Building blocks with parameters, those of gated_deltanet.modules."""

from gated_deltanet.modules import *  # noqa: F403
from gated_deltanet.modules import __all__ as __all__
