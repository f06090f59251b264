"""What every token mixer does with its input."""

from collections.abc import Callable

from torch import Tensor

from gated_deltanet.modules.autocast import autocasts, cast_for_autocast
from gated_deltanet.ops.utils import check_cu_seqlens, check_shape, find_padding, reject


def mix_packed(
    owner: str,
    hidden_states: Tensor,
    hidden_size: int,
    weight: Tensor,
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    mixer: Callable[[Tensor, Tensor | None], Tensor],
) -> Tensor:
    """mixer(hidden_states, cu_seqlens) after checks, on padded batches in packed form.

    Outputs at padding are 0, and padding changes neither states nor later outputs. `weight` is
    what hidden_states are multiplied by first.
    """
    check_shape(owner, "hidden_states", hidden_states, (-1, -1, hidden_size), "[B, T, hidden_size]")
    # Weights on the meta device are those that accelerate loads when they are needed.
    x = hidden_states
    if weight.device != x.device and not weight.is_meta:
        reject(owner, "hidden_states", f"on {weight.device} like the weights", hidden_states)
    casts = autocasts(x) or not weight.is_floating_point()
    if weight.dtype != x.dtype and not casts:
        reject(owner, "hidden_states", f"{weight.dtype} like the weights", hidden_states)
    x = cast_for_autocast(x)
    if cu_seqlens is not None:
        if attention_mask is not None:
            reject(owner, "attention_mask", "None with cu_seqlens", attention_mask)
        return mixer(x, check_cu_seqlens(owner, cu_seqlens, x.shape[0], x.shape[1]))
    if attention_mask is not None:
        padding = find_padding(owner, attention_mask, x.shape[0], x.shape[1])
        if padding is not None:
            return padding.repad(mixer(padding.unpad(x), padding.cu_seqlens))
    return mixer(x, None)


def refuse_attentions(owner: str, output_attentions: bool | None) -> None:
    """No mixer of ours forms attention weights."""
    if output_attentions:
        reject(owner, "output_attentions", "False: no attention weights are formed", True)
