"""One cast for several linear maps of the same input."""

import torch
from torch import Tensor


def cast_for_autocast(x: Tensor) -> Tensor:
    """x in autocast's dtype where autocast is on, else x.

    Each linear map would cast, and keep for its backward, a copy of its own.
    """
    device = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return x
    return x.to(torch.get_autocast_dtype(device))
