"""The Gated DeltaNet token mixer (arXiv 2412.06464, section 3.4)."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gated_deltanet.layers.cache import LayerCache, check_cached, layer_cache
from gated_deltanet.layers.mixer import mix_packed, refuse_attentions
from gated_deltanet.modules import FusedRMSNormGated, RMSNorm, ShortConvolution
from gated_deltanet.modules.projections import apply, is_plain, project
from gated_deltanet.ops.gated_delta_rule import (
    chunk_gated_delta_rule,
    fused_recurrent_gated_delta_rule,
    fused_recurrent_gated_delta_rule_update,
)
from gated_deltanet.ops.utils import longest_sequence, reject

_RECURRENT_TOKENS = 64  # up to here the recurrent form is the faster one for inference
_MIN_STEP, _MAX_STEP, _STEP_FLOOR = 1e-3, 1e-1, 1e-4  # of softplus(dt_bias), at first
_MAX_DECAY = 16.0  # of exp(A_log), at first


class GatedDeltaNet(nn.Module):
    """o_proj(norm(gated delta rule(conv(q), conv(k), conv(v), a, b))).

    q and k are L2-normalised, the output is scaled by head_dim^-1/2, the decay is
    g = -exp(A_log) * softplus(a + dt_bias) and the write strength beta = sigmoid(b).

    Parameters: `q_proj`, `k_proj`, `v_proj`, `a_proj`, `b_proj`, `g_proj`, `o_proj` (linear, no
    bias), `A_log` and `dt_bias` ([HV], fp32 whatever the module is cast to, and no weight decay),
    `q_conv1d`, `k_conv1d`, `v_conv1d` (weight [D, 1, W]), `o_norm`.

    Args:
        hidden_size: of input and output.
        expand_v: V / K; head_dim * expand_v must be a whole number.
        head_dim: K.
        num_heads: H, of queries and keys.
        num_v_heads: HV, a multiple of num_heads. Default: num_heads.
        mode: "chunk" or "fused_recurrent". In evaluation, sequences of at most 64 tokens take the
            recurrent form whatever the mode.
        use_gate: gate the output by silu(g_proj(x)); otherwise `o_norm` is a plain RMSNorm.
        use_short_conv: short convolutions over q, k and v; otherwise SiLU alone.
        allow_neg_eigval: beta = 2 sigmoid(b), so that transitions may have negative eigenvalues.
        conv_size: W, from 2 to 8.
        conv_bias: learn offsets in the convolutions.
        layer_idx: this layer's place in a model's cache.
        norm_eps: of o_norm.

    Attributes:
        recompute: in training without a cache, keep the projections alone and compute what lies
            between them and o_proj again in the backward. None, as at first: on GPUs, and where
            torch.compile does not decide what to keep.

    Raises:
        ValueError: naming the argument, what was expected and what came.

    Examples:
        >>> import torch
        >>> from gated_deltanet.layers import GatedDeltaNet
        >>> layer = GatedDeltaNet(hidden_size=64, head_dim=16, num_heads=2)
        >>> output, _, _ = layer(torch.randn(2, 100, 64))
        >>> output.shape
        torch.Size([2, 100, 64])
    """

    def __init__(
        self,
        hidden_size: int = 2048,
        expand_v: float = 2.0,
        head_dim: int = 256,
        num_heads: int = 6,
        num_v_heads: int | None = None,
        mode: str = "chunk",
        use_gate: bool = True,
        use_short_conv: bool = True,
        allow_neg_eigval: bool = False,
        conv_size: int = 4,
        conv_bias: bool = False,
        layer_idx: int | None = None,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.expand_v = expand_v
        self.head_k_dim = head_dim
        self.num_heads = num_heads
        self.num_v_heads = num_heads if num_v_heads is None else num_v_heads
        self.mode = mode
        self.use_gate = use_gate
        self.use_short_conv = use_short_conv
        self.allow_neg_eigval = allow_neg_eigval
        self.layer_idx = layer_idx
        self.recompute: bool | None = None
        self._check_options(conv_size)
        self.head_v_dim = round(head_dim * expand_v)
        key_dim, value_dim = num_heads * head_dim, self.num_v_heads * self.head_v_dim

        self.q_proj = nn.Linear(hidden_size, key_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, key_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, value_dim, bias=False)
        self.a_proj = nn.Linear(hidden_size, self.num_v_heads, bias=False)
        self.b_proj = nn.Linear(hidden_size, self.num_v_heads, bias=False)
        self.A_log = nn.Parameter(torch.empty(self.num_v_heads, dtype=torch.float32))
        self.dt_bias = nn.Parameter(torch.empty(self.num_v_heads, dtype=torch.float32))
        # As flash-linear-attention marks parameters for optimisers that look for it.
        for parameter in (self.A_log, self.dt_bias):
            setattr(parameter, "_no_weight_decay", True)  # noqa: B010 (unknown to type checkers)
        if use_short_conv:
            self.q_conv1d = ShortConvolution(key_dim, conv_size, conv_bias)
            self.k_conv1d = ShortConvolution(key_dim, conv_size, conv_bias)
            self.v_conv1d = ShortConvolution(value_dim, conv_size, conv_bias)
        if use_gate:
            self.g_proj = nn.Linear(hidden_size, value_dim, bias=False)
            self.o_norm: nn.Module = FusedRMSNormGated(self.head_v_dim, norm_eps)
        else:
            self.o_norm = RMSNorm(self.head_v_dim, norm_eps)
        self.o_proj = nn.Linear(value_dim, hidden_size, bias=False)
        self.reset_gate_parameters()

    def _check_options(self, conv_size: int) -> None:
        name = type(self).__name__
        for field in ("hidden_size", "head_k_dim", "num_heads"):
            if getattr(self, field) <= 0:
                argument = "head_dim" if field == "head_k_dim" else field
                reject(name, argument, "positive", getattr(self, field))
        if self.num_v_heads <= 0 or self.num_v_heads % self.num_heads != 0:
            expected = f"a multiple of num_heads = {self.num_heads}"
            reject(name, "num_v_heads", expected, self.num_v_heads)
        V = self.head_k_dim * self.expand_v
        if V < 1 or abs(V - round(V)) > 1e-5 * V:
            expected = (
                f"such that head_dim * expand_v is a whole number, head_dim {self.head_k_dim}"
            )
            reject(name, "expand_v", expected, self.expand_v)
        if self.mode not in ("chunk", "fused_recurrent"):
            reject(name, "mode", '"chunk" or "fused_recurrent"', f'"{self.mode}"')
        if self.use_short_conv and not 2 <= conv_size <= 8:
            reject(name, "conv_size", "from 2 to 8", conv_size)

    @torch.no_grad()
    def reset_gate_parameters(self) -> None:
        """exp(A_log) ~ U(0, 16); softplus(dt_bias) log-uniform in [1e-3, 1e-1]."""
        self.A_log.uniform_(0, _MAX_DECAY).log_()
        step = torch.empty_like(self.dt_bias).uniform_(math.log(_MIN_STEP), math.log(_MAX_STEP))
        step = step.exp_().clamp_min_(_STEP_FLOOR)
        self.dt_bias.copy_(step + (-(-step).expm1()).log())  # the inverse of softplus

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "GatedDeltaNet":
        """Moves and casts; A_log and dt_bias stay fp32 when the rest goes to a narrower dtype."""

        def keep_wide(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype.itemsize >= 4 else tensor.to(moved.device)

        if recurse:
            for child in self.children():
                child._apply(fn)
        return super()._apply(keep_wide, recurse=False)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        output_attentions: bool | None = False,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, None, Any]:
        """Mixes tokens.

        Args:
            hidden_states: [B, T, hidden_size].
            attention_mask: [B, T] (or [B, past + T]), 0 for padding, on the left: it changes
                neither states nor later outputs, and its own outputs are 0.
            past_key_values: a model's GatedDeltaNetCache or a LayerCache, with B rows (N with
                cu_seqlens); read and updated. With gradients off, states are updated in place.
            use_cache: whether a cache is expected; a cache that is given is used in any case.
            output_attentions: must be false.
            cu_seqlens: [N + 1] int64 or int32: B is 1 and holds N sequences one after another;
                excludes attention_mask.

        Returns:
            Output [B, T, hidden_size], None, and past_key_values.

        Raises:
            ValueError: naming the argument, what was expected and what came.
        """
        name = type(self).__name__
        refuse_attentions(name, output_attentions)
        if use_cache and past_key_values is None:
            reject(name, "past_key_values", "a LayerCache or a model's cache with use_cache", None)
        cache = layer_cache(name, past_key_values, self.layer_idx)
        output = mix_packed(
            name,
            hidden_states,
            self.hidden_size,
            self.q_proj.weight,
            attention_mask,
            cu_seqlens,
            lambda x, boundaries: self._mix(x, boundaries, cache),
        )
        return output, None, past_key_values

    def _mix(self, x: Tensor, cu_seqlens: Tensor | None, cache: LayerCache | None) -> Tensor:
        if cache is not None:
            N = x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
            sizes = (N, self.num_v_heads, self.head_k_dim, self.head_v_dim)
            check_cached(type(self).__name__, "recurrent_state", cache.recurrent_state, sizes)
        projections = [self.q_proj, self.k_proj, self.v_proj, self.a_proj, self.b_proj]
        if self.use_gate:
            projections.append(self.g_proj)
        projected = project(x, projections)
        if not self._recomputes(x, cache):
            return apply(self.o_proj, self._mix_projections(cu_seqlens, cache, *projected))
        # With o_proj in it its input is not kept either; the backward stops before the product.
        whole = is_plain(self.o_proj)

        def mix(*projected: Tensor) -> Tensor:
            mixed = self._mix_projections(cu_seqlens, None, *projected)
            return apply(self.o_proj, mixed) if whole else mixed

        output = checkpoint(mix, *projected, use_reentrant=False, preserve_rng_state=False)
        return output if whole else apply(self.o_proj, output)

    def _recomputes(self, x: Tensor, cache: LayerCache | None) -> bool:
        if cache is not None or not torch.is_grad_enabled():
            return False
        if self.recompute is None:
            return x.is_cuda and not torch.compiler.is_compiling()
        return self.recompute

    def _mix_projections(
        self,
        cu_seqlens: Tensor | None,
        cache: LayerCache | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        a: Tensor,
        b: Tensor,
        g: Tensor | None = None,
    ) -> Tensor:
        """From the projections [B, T, ...] to what o_proj takes, [B, T, HV V]."""
        q = self._convolve("q", q, cu_seqlens, cache).unflatten(-1, (-1, self.head_k_dim))
        k = self._convolve("k", k, cu_seqlens, cache).unflatten(-1, (-1, self.head_k_dim))
        v = self._convolve("v", v, cu_seqlens, cache).unflatten(-1, (-1, self.head_v_dim))
        o = self._gated_delta_rule(q, k, v, a, b, cu_seqlens, cache)
        if self.use_gate:
            o = self.o_norm(o, g.unflatten(-1, (-1, self.head_v_dim)))
        else:
            o = self.o_norm(o)
        return o.flatten(-2)

    def _convolve(
        self, name: str, x: Tensor, cu_seqlens: Tensor | None, cache: LayerCache | None
    ) -> Tensor:
        """`name` is "q", "k" or "v"."""
        if not self.use_short_conv:
            return nn.functional.silu(x)
        convolution = getattr(self, f"{name}_conv1d")
        if cache is None:
            return convolution(x, cu_seqlens)[0]
        y, state = convolution(
            x, cu_seqlens, getattr(cache, f"conv_{name}"), output_final_state=True
        )
        setattr(cache, f"conv_{name}", state)
        return y

    def _gated_delta_rule(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        a: Tensor,
        b: Tensor,
        cu_seqlens: Tensor | None,
        cache: LayerCache | None,
    ) -> Tensor:
        """q, k [B, T, H, K]; v [B, T, HV, V]; a, b [B, T, HV] -> o [B, T, HV, V]."""
        options: dict[str, Any] = {
            "use_qk_l2norm_in_kernel": True,
            "use_beta_sigmoid_in_kernel": True,
            "allow_neg_eigval": self.allow_neg_eigval,
            "cu_seqlens": cu_seqlens,
            "use_gate_in_kernel": True,
            "A_log": self.A_log,
            "dt_bias": self.dt_bias,
        }
        recurrent = self._is_recurrent(q.shape[1], cu_seqlens)
        rule = fused_recurrent_gated_delta_rule if recurrent else chunk_gated_delta_rule
        if cache is None:
            return rule(q, k, v, a, b, **options)[0]
        if recurrent and cache.recurrent_state is not None and not torch.is_grad_enabled():
            state = cache.recurrent_state
            return fused_recurrent_gated_delta_rule_update(q, k, v, a, b, state, **options)
        o, cache.recurrent_state = rule(
            q, k, v, a, b, initial_state=cache.recurrent_state, output_final_state=True, **options
        )
        return o

    def _is_recurrent(self, T: int, cu_seqlens: Tensor | None) -> bool:
        if self.mode == "fused_recurrent" or (not self.training and T <= _RECURRENT_TOKENS):
            return True
        # A compiled graph must not read the boundaries' values.
        if self.training or cu_seqlens is None or torch.compiler.is_compiling():
            return False
        return longest_sequence(cu_seqlens) <= _RECURRENT_TOKENS

    def extra_repr(self) -> str:
        return (
            f"hidden_size={self.hidden_size}, num_heads={self.num_heads}, "
            f"num_v_heads={self.num_v_heads}, head_k_dim={self.head_k_dim}, "
            f"head_v_dim={self.head_v_dim}, mode={self.mode}"
        )
