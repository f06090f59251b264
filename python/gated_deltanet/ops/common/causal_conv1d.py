"""Causal depthwise convolution over a few tokens, the short convolution of linear attention."""

import torch
from torch import Tensor

import gated_deltanet._library  # noqa: F401 (registers the operators)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """y_t = activation(bias + sum_w weight[:, w] * x_{t - W + 1 + w}).

    Args:
        x: [B, T, D] in fp32, bf16, fp16 (accumulated in fp32) or fp64.
        weight: [D, W] with 2 <= W <= 8, in x's dtype or fp32.
        bias: [D], dtype of weight.
        activation: "silu", its other name "swish", or None.
        initial_state: [N, D, W - 1] in x's dtype: the inputs before each sequence's first token,
            oldest first. Default: zeros.
        output_final_state: also return the state after the last token.
        cu_seqlens: [N + 1] int64 or int32: packed sequences, B is 1. No sequence sees another's
            tokens.

    Returns:
        y like x, and the final state [N, D, W - 1] in x's dtype, or None unless
        `output_final_state`. Differentiable in x, weight, bias and initial_state.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    y, final_state = torch.ops.gdn.causal_conv1d(
        x, weight, bias, activation, initial_state, output_final_state, cu_seqlens
    )
    return y, final_state if output_final_state else None


def causal_conv1d_update(
    x: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """Further tokens of N sequences, in place on their states; not differentiable.

    Args:
        x: [N, T, D], or [N, D] for one token.
        state: [N, D, W - 1] in x's dtype, read and written.
        weight: [D, W].
        bias: [D].
        activation: "silu", "swish" or None.

    Returns:
        y like x.

    Raises:
        ValueError: naming the argument, what was expected and what came; also when a tensor
            requires a gradient.
    """
    return torch.ops.gdn.causal_conv1d_update(x, state, weight, bias, activation)
