"""One cast for several linear maps of the same input."""

import torch
from torch import Tensor


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on for the device of x; the meta device has none."""
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def cast_for_autocast(x: Tensor) -> Tensor:
    """x in autocast's dtype where autocast is on, else x.

    Each linear map would cast, and keep for its backward, a copy of its own.
    """
    if x.dtype == torch.float64 or not autocasts(x):
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))
