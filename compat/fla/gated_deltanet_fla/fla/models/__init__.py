"""Configuration and language models, those of gated_deltanet.models."""

from gated_deltanet.models import *  # noqa: F403
from gated_deltanet.models import __all__ as __all__
