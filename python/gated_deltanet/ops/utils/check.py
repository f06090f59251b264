"""The one way in which layers and models reject an argument; operators check their own in C++."""

from typing import NoReturn

from torch import Tensor


def describe(tensor: Tensor) -> str:
    """Such as "float32 [2, 64, 4, 128] on cpu"."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} on {tensor.device}"


def reject(owner: str, argument: str, expected: str, got: object) -> NoReturn:
    """Raises ValueError "OWNER: ARGUMENT must be EXPECTED, got GOT"."""
    text = describe(got) if isinstance(got, Tensor) else got
    raise ValueError(f"{owner}: {argument} must be {expected}, got {text}")


def check_shape(
    owner: str, argument: str, tensor: Tensor, sizes: tuple[int, ...], expected: str
) -> None:
    """Rejects a tensor unless its sizes are `sizes`; -1 stands for any size."""
    if tensor.dim() != len(sizes) or any(
        size != -1 and size != actual for size, actual in zip(sizes, tensor.shape, strict=True)
    ):
        reject(owner, argument, f"of shape {expected}", tensor)
