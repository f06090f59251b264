"""The short causal depthwise convolution of linear attention, with SiLU."""

import math

import torch
from torch import Tensor, nn

from gated_deltanet.ops.common import causal_conv1d, causal_conv1d_update


class ShortConvolution(nn.Module):
    """silu(bias + sum_w weight[:, w] * x_{t - W + 1 + w}), channel by channel.

    Args:
        channels: D.
        kernel_size: W, from 2 to 8.
        bias: learn an offset for each channel.
    """

    def __init__(self, channels: int, kernel_size: int = 4, bias: bool = False) -> None:
        super().__init__()
        self.channels, self.kernel_size = channels, kernel_size
        bound = 1 / math.sqrt(kernel_size)  # Conv1d's: W inputs a channel
        self.weight = nn.Parameter(torch.empty(channels, 1, kernel_size).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(channels).uniform_(-bound, bound)) if bias else None

    def forward(
        self,
        x: Tensor,
        cu_seqlens: Tensor | None = None,
        state: Tensor | None = None,
        output_final_state: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """x [B, T, D] -> y [B, T, D] and the final state, or None unless `output_final_state`.

        Args:
            x: [B, T, D].
            cu_seqlens: [N + 1]: B is 1, and sequences do not see each other.
            state: [N, D, W - 1], the inputs before the first token; zeros when absent. With
                gradients off it may be updated in place, and is then the final state.
            output_final_state: whether the inputs before the next token are wanted.
        """
        taps = self.weight.squeeze(1)
        in_place = output_final_state and cu_seqlens is None and not torch.is_grad_enabled()
        if state is not None and in_place:
            return causal_conv1d_update(x, state, taps, self.bias, "silu"), state
        return causal_conv1d(x, taps, self.bias, "silu", state, output_final_state, cu_seqlens)

    def extra_repr(self) -> str:
        return f"{self.channels}, kernel_size={self.kernel_size}, bias={self.bias is not None}"
