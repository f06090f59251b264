"""The gated delta rule (arXiv 2412.06464, equation 10; chunked form: section 3.3).

Per value head, with the state S [K, V]:

    S_t = exp(g_t) S_{t-1} + k_t u_t^T        u_t = beta_t (v_t - exp(g_t) S_{t-1}^T k_t)
    o_t = scale * S_t^T q_t
"""

import torch
from torch import Tensor

import gated_deltanet._library  # noqa: F401 (registers the operators)

__all__ = [
    "chunk_gated_delta_rule",
    "fused_recurrent_gated_delta_rule",
    "fused_recurrent_gated_delta_rule_states",
    "fused_recurrent_gated_delta_rule_update",
    "gated_delta_rule_gate",
]


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor | None]:
    """The chunked form: for training and prefill.

    Differentiable in every tensor except `cu_seqlens`. Gates, sums and states are computed in fp32
    (fp64 for fp64 input, which is served by the reference kernels, for gradient checks).

    Args:
        q: [B, T, H, K] in fp32, bf16, fp16 or fp64.
        k: [B, T, H, K], dtype of q.
        v: [B, T, HV, V], dtype of q. HV is a multiple of H; value head h uses key head
            h // (HV // H).
        g: [B, T, HV], log of the decay, <= 0; any floating dtype.
        beta: [B, T, HV], write strength; any floating dtype.
        scale: factor of the output. Default: K^-1/2.
        initial_state: [N, HV, K, V] fp32, the state before the first token; N is B, or the number
            of packed sequences. Default: zeros.
        output_final_state: also return the state after the last token.
        use_qk_l2norm_in_kernel: divide q and k by their norm first: x * rsqrt(sum(x^2) + 1e-6).
        use_beta_sigmoid_in_kernel: `beta` holds logits: beta <- sigmoid(beta).
        allow_neg_eigval: beta <- 2 sigmoid(beta), so that transitions may have negative
            eigenvalues; needs `use_beta_sigmoid_in_kernel`.
        state_v_first: states are [N, HV, V, K].
        cu_seqlens: [N + 1] int64 or int32: B is 1 and sequence n holds the tokens cu_seqlens[n] to
            cu_seqlens[n + 1]. Nothing passes from one sequence to the next.
        use_gate_in_kernel: `g` holds the gate's input: g <- -exp(A_log) * softplus(g + dt_bias).
        A_log: [HV] fp32, with `use_gate_in_kernel`.
        dt_bias: [HV] fp32, with `use_gate_in_kernel`. Default: zeros.
        chunk_size: tokens per chunk, 16, 32, 64 or 128; changes rounding only.

    Returns:
        o [B, T, HV, V] in the dtype of v, and the final state like `initial_state`, or None unless
        `output_final_state`.

    Raises:
        ValueError: naming the argument, what was expected and what came.

    Examples:
        >>> import torch
        >>> from gated_deltanet.ops.gated_delta_rule import chunk_gated_delta_rule
        >>> q, k, v = torch.randn(3, 1, 100, 2, 16).unbind()
        >>> g, beta = -torch.rand(1, 100, 2), torch.rand(1, 100, 2)
        >>> o, state = chunk_gated_delta_rule(q, k, v, g, beta, output_final_state=True,
        ...                                   use_qk_l2norm_in_kernel=True)
        >>> o.shape, state.shape
        (torch.Size([1, 100, 2, 16]), torch.Size([1, 2, 16, 16]))
    """
    o, final_state = torch.ops.gdn.chunk_gated_delta_rule(
        q,
        k,
        v,
        g,
        beta,
        scale,
        initial_state,
        output_final_state,
        use_qk_l2norm_in_kernel,
        use_beta_sigmoid_in_kernel,
        allow_neg_eigval,
        state_v_first,
        cu_seqlens,
        use_gate_in_kernel,
        A_log,
        dt_bias,
        chunk_size,
    )
    return o, final_state if output_final_state else None


def fused_recurrent_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor | None]:
    """The recurrent form, token by token: for decoding and short sequences.

    Arguments, results, errors and gradients are those of `chunk_gated_delta_rule`; `chunk_size`
    only matters to its backward, which is the chunked one.

    Examples:
        >>> import torch
        >>> from gated_deltanet.ops.gated_delta_rule import fused_recurrent_gated_delta_rule
        >>> q, k, v = torch.randn(3, 2, 1, 4, 8).unbind()
        >>> g, beta = -torch.rand(2, 1, 4), torch.rand(2, 1, 4)
        >>> o, state = fused_recurrent_gated_delta_rule(q, k, v, g, beta)
        >>> o.shape, state
        (torch.Size([2, 1, 4, 8]), None)
    """
    o, final_state = torch.ops.gdn.fused_recurrent_gated_delta_rule(
        q,
        k,
        v,
        g,
        beta,
        scale,
        initial_state,
        output_final_state,
        use_qk_l2norm_in_kernel,
        use_beta_sigmoid_in_kernel,
        allow_neg_eigval,
        state_v_first,
        cu_seqlens,
        use_gate_in_kernel,
        A_log,
        dt_bias,
        chunk_size,
    )
    return o, final_state if output_final_state else None


def fused_recurrent_gated_delta_rule_update(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    scale: float | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
) -> Tensor:
    """The recurrent form in place: `state` is the initial state and becomes the final one.

    Args:
        state: [N, HV, K, V] fp32, read and written. On a CPU it may be bf16, rounded once a call.

    The other arguments are those of `chunk_gated_delta_rule`.

    Returns:
        o [B, T, HV, V] in the dtype of v.

    Raises:
        ValueError: as there, and when a tensor requires a gradient: call it under `torch.no_grad`.
    """
    return torch.ops.gdn.fused_recurrent_gated_delta_rule_update(
        q,
        k,
        v,
        g,
        beta,
        state,
        scale,
        use_qk_l2norm_in_kernel,
        use_beta_sigmoid_in_kernel,
        allow_neg_eigval,
        state_v_first,
        cu_seqlens,
        use_gate_in_kernel,
        A_log,
        dt_bias,
    )


def fused_recurrent_gated_delta_rule_states(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrent form with the state after every token, for speculative decoding.

    Once it is known how many drafted tokens are accepted, the state to go on with is
    `states[:, accepted - 1]`. On a GPU this costs one write of the state a token; where that is too
    much memory, verify without states and replay the accepted tokens with
    `fused_recurrent_gated_delta_rule_update`.

    The arguments are those of `chunk_gated_delta_rule`.

    Returns:
        o [B, T, HV, V] in the dtype of v, and the states [B, T, HV, K, V] fp32 (fp64 for fp64
        input), or [B, T, HV, V, K] with `state_v_first`.

    Raises:
        ValueError: as there, and when a tensor requires a gradient: call it under `torch.no_grad`.

    Examples:
        >>> import torch
        >>> from gated_deltanet.ops.gated_delta_rule import (
        ...     fused_recurrent_gated_delta_rule_states)
        >>> q, k, v = torch.randn(3, 2, 5, 4, 8).unbind()
        >>> g, beta = -torch.rand(2, 5, 4), torch.rand(2, 5, 4)
        >>> o, states = fused_recurrent_gated_delta_rule_states(q, k, v, g, beta)
        >>> o.shape, states.shape
        (torch.Size([2, 5, 4, 8]), torch.Size([2, 5, 4, 8, 8]))
    """
    return torch.ops.gdn.fused_recurrent_gated_delta_rule_states(
        q,
        k,
        v,
        g,
        beta,
        scale,
        initial_state,
        use_qk_l2norm_in_kernel,
        use_beta_sigmoid_in_kernel,
        allow_neg_eigval,
        state_v_first,
        use_gate_in_kernel,
        A_log,
        dt_bias,
    )


def gated_delta_rule_gate(a: Tensor, A_log: Tensor, dt_bias: Tensor) -> Tensor:
    """The log of the decay: g = -exp(A_log) * softplus(a + dt_bias).

    Args:
        a: [..., HV] in fp32, bf16, fp16 or fp64.
        A_log: [HV].
        dt_bias: [HV].

    Returns:
        g [..., HV] fp32 (fp64 for fp64 input), <= 0. Differentiable in all three.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    return torch.ops.gdn.gated_delta_rule_gate(a, A_log, dt_bias)
