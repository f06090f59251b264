"""Channels come before time here, [B, D, T], as in causal-conv1d. gated_deltanet's operator has
[B, T, D]; transposing costs nothing."""

import torch

from gated_deltanet.ops import causal_conv1d


def causal_conv1d_fn(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    initial_states: torch.Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: torch.Tensor | None = None,
    activation: str | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Causal depthwise convolution: y_t = activation(bias + sum_w weight[:, w] x_{t - W + 1 + w}).

    Args:
        x: [B, D, T] fp32, bf16 or fp16; fastest where its channels are adjacent in memory.
        weight: [D, W] with 2 <= W <= 8, in x's dtype or fp32.
        bias: [D] in weight's dtype.
        seq_idx: [B, T] integers, packed sequences: neighbours with different numbers do not see
            each other.
        initial_states: [B, D, W - 1], the inputs before the first token; zeros by default.
        return_final_states: also return the last W - 1 inputs, [B, D, W - 1].
        final_states_out: where to write those.
        activation: None, "silu" or "swish".
        cu_seq_lens_q: [N + 1] integers, the packed sequences' boundaries in a batch of one, by the
            name that transformers gives them. Without this argument, which causal-conv1d does not
            have, a convolution would mix the sequences of callers that pass no seq_idx.

    Returns: y [B, D, T], or y and the final states.

    Raises: ValueError where a shape or dtype does not fit, and for packed sequences with states.
    """
    rows = x.transpose(1, 2)  # [B, T, D]
    if seq_idx is None and cu_seq_lens_q is None:
        y, final = causal_conv1d(
            rows, weight, bias, activation, initial_states, return_final_states
        )
    elif initial_states is not None or return_final_states:
        raise ValueError(
            "causal_conv1d_fn: initial_states and return_final_states must be absent with packed"
            " sequences (seq_idx or cu_seq_lens_q)"
        )
    else:
        if seq_idx is not None:
            cu_seq_lens_q = _boundaries(seq_idx, rows)
            rows = rows.reshape(1, -1, rows.shape[-1])
        y, final = causal_conv1d(rows, weight, bias, activation, cu_seqlens=cu_seq_lens_q)
        y = y.view(x.shape[0], x.shape[2], x.shape[1])
    y = y.transpose(1, 2)
    if not return_final_states:
        return y
    return y, final if final_states_out is None else final_states_out.copy_(final)


def _boundaries(seq_idx: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Where sequences begin and end [N + 1] in the rows of all batches, one after another."""
    if seq_idx.shape != rows.shape[:2]:
        raise ValueError(
            f"causal_conv1d_fn: seq_idx must be of shape [B, T] = {list(rows.shape[:2])}, got"
            f" {list(seq_idx.shape)}"
        )
    begins = torch.ones_like(seq_idx, dtype=torch.bool)
    begins[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    return torch.nn.functional.pad(begins.flatten().nonzero()[:, 0], (0, 1), value=begins.numel())


def causal_conv1d_update(
    x: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
) -> torch.Tensor:
    """One or more further tokens, in place on the state.

    Args:
        x: [B, D] or [B, D, T].
        conv_state: [B, D, S] with S >= W - 1: the last S inputs, oldest first. Updated.
        weight, bias, activation: as for `causal_conv1d_fn`.

    Returns: y like x.

    Raises: ValueError where a shape or dtype does not fit.
    """
    W = weight.shape[-1]
    if conv_state.dim() != 3 or conv_state.shape[-1] < W - 1:
        raise ValueError(
            f"causal_conv1d_update: conv_state must be of shape [B, D, S] with S >= {W - 1}, got"
            f" {list(conv_state.shape)}"
        )
    new = x.unsqueeze(-1) if x.dim() == 2 else x  # [B, D, T]
    recent = conv_state[..., conv_state.shape[-1] - (W - 1) :]
    y, _ = causal_conv1d(new.transpose(1, 2), weight, bias, activation, recent)
    conv_state.copy_(torch.cat([conv_state, new], dim=-1)[..., -conv_state.shape[-1] :])
    return y.transpose(1, 2).reshape(x.shape)
