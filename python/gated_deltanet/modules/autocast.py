"""One cast for several linear maps of the same input."""

import torch
from torch import Tensor


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on for the device of x; some, such as meta, have none."""
    device = x.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def cast_for_autocast(x: Tensor) -> Tensor:
    """x in autocast's dtype where autocast is on, else x.

    Each linear map would cast, and keep for its backward, a copy of its own.
    """
    if x.dtype == torch.float64 or not autocasts(x):
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))
