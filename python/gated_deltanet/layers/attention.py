"""Softmax attention for hybrid models: full or in a window, grouped queries, rotary positions."""

from typing import Any

import torch
from torch import Tensor, nn

from gated_deltanet.layers.cache import LayerCache, check_cached, layer_cache
from gated_deltanet.layers.mixer import mix_packed, refuse_attentions
from gated_deltanet.modules import RMSNorm, RotaryEmbedding
from gated_deltanet.ops.utils import reject

_QUERY_BLOCK = 512  # queries that share one mask: bounds its memory, which would be quadratic


class Attention(nn.Module):
    """Causal attention by torch's `scaled_dot_product_attention`.

    Args:
        hidden_size: of input and output; a multiple of num_heads.
        num_heads: of queries.
        num_kv_heads: of keys and values, a divisor of num_heads. Default: num_heads.
        qkv_bias: learn offsets of q, k and v.
        qk_norm: RMSNorm over each head of q and k.
        window_size: tokens that a token sees, itself included. Default: all.
        rope_theta: base of the rotary embedding.
        layer_idx: this layer's place in a model's cache.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """

    def __init__(
        self,
        hidden_size: int = 2048,
        num_heads: int = 32,
        num_kv_heads: int | None = None,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        window_size: int | None = None,
        rope_theta: float = 10000.0,
        layer_idx: int | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if num_heads <= 0 or hidden_size % num_heads != 0:
            reject(name, "num_heads", f"a divisor of hidden_size = {hidden_size}", num_heads)
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if self.num_kv_heads <= 0 or num_heads % self.num_kv_heads != 0:
            reject(name, "num_kv_heads", f"a divisor of num_heads = {num_heads}", num_kv_heads)
        if window_size is not None and window_size <= 0:
            reject(name, "window_size", "positive or None", window_size)
        self.hidden_size = hidden_size
        self.num_heads = num_heads
        self.head_dim = hidden_size // num_heads
        self.window_size = window_size
        self.layer_idx = layer_idx
        self.rotary = RotaryEmbedding(self.head_dim, rope_theta)
        kv_dim = self.num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=qkv_bias)
        self.k_proj = nn.Linear(hidden_size, kv_dim, bias=qkv_bias)
        self.v_proj = nn.Linear(hidden_size, kv_dim, bias=qkv_bias)
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.q_norm = RMSNorm(self.head_dim) if qk_norm else None
        self.k_norm = RMSNorm(self.head_dim) if qk_norm else None

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        output_attentions: bool | None = False,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, None, Any]:
        """Arguments, results and errors are those of `GatedDeltaNet.forward`."""
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
        B, T = x.shape[:2]
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))  # [B, T, heads, D]
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim))  # [B, T, kv heads, D]
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        lengths = torch.full((B,), T) if cu_seqlens is None else cu_seqlens.diff().cpu().long()
        if cache is not None and cache.attn_tokens is not None and cache.attn_key is not None:
            check_cached(type(self).__name__, "attn_tokens", cache.attn_tokens, (len(lengths),))
            sizes = (len(lengths), self.num_kv_heads, *cache.attn_key.shape[2:3], self.head_dim)
            check_cached(type(self).__name__, "attn_key", cache.attn_key, sizes)
            past = cache.attn_tokens
        else:
            past = torch.zeros_like(lengths)

        positions = torch.arange(T)
        if cu_seqlens is not None:
            shift = past - cu_seqlens[:-1].cpu()
            positions = (positions + shift.repeat_interleave(lengths)).unsqueeze(0)  # [1, T]
        else:
            positions = positions + past.unsqueeze(1)  # [B, T]
        angles = self.rotary.angles(positions.to(x.device))
        q = RotaryEmbedding.rotate(q, angles).transpose(1, 2)  # [B, heads, T, D]
        k = RotaryEmbedding.rotate(k, angles).transpose(1, 2)
        o = self._attend(q, k, v.transpose(1, 2), cu_seqlens, lengths, past, cache)
        return self.o_proj(o.transpose(1, 2).flatten(-2))

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens: Tensor | None,
        lengths: Tensor,
        past: Tensor,
        cache: LayerCache | None,
    ) -> Tensor:
        """q [B, heads, T, D]; k, v [B, kv heads, T, D]; lengths, past [N] -> [B, heads, T, D]."""
        if cache is None and cu_seqlens is None:
            return causal_attention(q, k, v, self.window_size)
        # Rows that have equally many tokens, as nearly always, go together; others one by one.
        together = cu_seqlens is None and bool((past == past[0]).all())
        pasts, begins = past.tolist(), [0, *lengths.cumsum(0).tolist()]
        old_key = cache.attn_key if cache is not None else None
        old_value = cache.attn_value if cache is not None else None
        outputs, keys, values = [], [], []
        for n in range(1 if together else len(pasts)):

            def select(x: Tensor, n: int = n) -> Tensor:  # this row's new tokens
                if together:
                    return x
                return x[n : n + 1] if cu_seqlens is None else x[:, :, begins[n] : begins[n + 1]]

            def extend(old: Tensor | None, x: Tensor, n: int = n) -> Tensor:
                if old is None or pasts[n] == 0:
                    return select(x, n)
                row = old if together else old[n : n + 1]
                cached = min(old.shape[2], pasts[n])
                return torch.cat([row[:, :, row.shape[2] - cached :], select(x, n)], 2)

            key, value = extend(old_key, k), extend(old_value, v)
            outputs.append(causal_attention(select(q), key, value, self.window_size))
            kept = key.shape[2] if self.window_size is None else self.window_size - 1
            keys.append(key[:, :, max(0, key.shape[2] - kept) :])
            values.append(value[:, :, max(0, key.shape[2] - kept) :])
        if cache is not None:
            cache.attn_key, cache.attn_value = stack_rows(keys), stack_rows(values)
            cache.attn_tokens = past + lengths
        return torch.cat(outputs, 0 if cu_seqlens is None else 2)


def stack_rows(rows: list[Tensor]) -> Tensor:
    """Stacks [1, heads, tokens, D] of different lengths, which end together."""
    longest = max(row.shape[2] for row in rows)
    pad = nn.functional.pad
    return torch.cat([pad(row, (0, 0, longest - row.shape[2], 0)) for row in rows])


def causal_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """Attention of q [B, heads, Tq, D] over k, v [B, kv heads, Tk, D].

    The queries are the last Tq of the Tk tokens, and each sees the last `window` tokens up to
    itself, or all.
    """
    Tq, Tk = q.shape[2], k.shape[2]
    past, grouped = Tk - Tq, q.shape[1] != k.shape[1]
    window = Tk if window is None else min(window, Tk)
    attention = nn.functional.scaled_dot_product_attention
    if Tq == 0:
        return q
    if past == 0 and window == Tk:
        return attention(q, k, v, is_causal=True, enable_gqa=grouped)
    blocks = []
    for begin in range(0, Tq, _QUERY_BLOCK):
        queries = min(_QUERY_BLOCK, Tq - begin)
        last = past + begin + queries  # keys past it are in the future of all of them
        first = max(0, past + begin + 1 - window)
        mask = None
        if queries > 1:
            query = torch.arange(past + begin, last, device=q.device).unsqueeze(1)
            distance = query - torch.arange(first, last, device=q.device)
            mask = (distance >= 0) & (distance < window)  # [queries, keys]
        block = q[:, :, begin : begin + queries]
        keys, values = k[:, :, first:last], v[:, :, first:last]
        blocks.append(attention(block, keys, values, attn_mask=mask, enable_gqa=grouped))
    return torch.cat(blocks, 2)
