#include <algorithm>
#include <string>

#include <ATen/ATen.h>

#include <gdn/layers/attention.h>
#include <gdn/layers/packing.h>
#include <gdn/ops/utils/check.h>

namespace gdn {
namespace {

constexpr const char* kName = "Attention";
/// Queries that share one mask: bounds its memory, which would otherwise be quadratic.
constexpr int64_t kQueryBlock = 512;

at::Tensor attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                     const std::optional<at::Tensor>& mask, bool causal) {
  return at::scaled_dot_product_attention(q, k, v, mask, /*dropout_p=*/0.0, causal,
                                          /*scale=*/std::nullopt,
                                          /*enable_gqa=*/q.size(1) != k.size(1));
}

/// Causal attention of q [B, heads, Tq, D] over k, v [B, kv heads, Tk, D]: the queries are the last
/// Tq of the Tk tokens, and each sees the last `window` tokens up to itself.
at::Tensor causal_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                            int64_t window) {
  const int64_t Tq = q.size(2), Tk = k.size(2), past = Tk - Tq;
  if (Tq == 0) return q;
  if (past == 0 && window >= Tk) return attention(q, k, v, std::nullopt, /*causal=*/true);
  std::vector<at::Tensor> blocks;
  for (int64_t begin = 0; begin < Tq; begin += kQueryBlock) {
    const int64_t queries = std::min(kQueryBlock, Tq - begin);
    const int64_t last = past + begin + queries;  // keys past it are in the future of all of them
    const int64_t first = std::max<int64_t>(0, past + begin + 1 - window);
    std::optional<at::Tensor> mask;
    if (queries > 1) {
      const auto integers = q.options().dtype(at::kLong);
      const at::Tensor query = at::arange(past + begin, last, integers).unsqueeze(1);
      const at::Tensor distance = query - at::arange(first, last, integers);
      mask = (distance >= 0) & (distance < window);  // [queries, keys]
    }
    blocks.push_back(attention(q.narrow(2, begin, queries), k.narrow(2, first, last - first),
                               v.narrow(2, first, last - first), mask, /*causal=*/false));
  }
  return at::cat(blocks, 2);
}

/// Stacks rows [1, heads, tokens, D] of different lengths, which end together.
at::Tensor stack_rows(const std::vector<at::Tensor>& rows) {
  int64_t longest = 0;
  for (const at::Tensor& row : rows) longest = std::max(longest, row.size(2));
  std::vector<at::Tensor> padded;
  for (const at::Tensor& row : rows) {
    padded.push_back(at::constant_pad_nd(row, {0, 0, longest - row.size(2), 0}));
  }
  return at::cat(padded);
}

}  // namespace

AttentionImpl::AttentionImpl(const AttentionOptions& options)
    : options(options),
      head_dim_(options.num_heads > 0 ? options.hidden_size / options.num_heads : 0),
      kv_heads_(options.num_kv_heads.value_or(options.num_heads)),
      rotary_({.head_dim = head_dim_, .base = options.rope_theta}) {
  const auto require = [](bool holds, const char* field, const char* expected, int64_t value) {
    if (!holds) reject(kName, field, expected, std::to_string(value));
  };
  require(options.hidden_size % options.num_heads == 0, "num_heads", "a divisor of hidden_size",
          options.num_heads);
  require(kv_heads_ > 0 && options.num_heads % kv_heads_ == 0, "num_kv_heads",
          "a divisor of num_heads", kv_heads_);
  require(options.window_size.value_or(1) > 0, "window_size", "positive",
          options.window_size.value_or(1));
  reset();
}

void AttentionImpl::reset() {
  const auto linear = [](int64_t in, int64_t out, bool bias) {
    return Linear(LinearOptions{.in_features = in, .out_features = out, .bias = bias});
  };
  const int64_t D = options.hidden_size, kv_dim = kv_heads_ * head_dim_;
  q_proj = register_module("q_proj", linear(D, D, options.qkv_bias));
  k_proj = register_module("k_proj", linear(D, kv_dim, options.qkv_bias));
  v_proj = register_module("v_proj", linear(D, kv_dim, options.qkv_bias));
  o_proj = register_module("o_proj", linear(D, D, false));
  if (options.qk_norm) {
    q_norm = register_module("q_norm", RMSNorm(RMSNormOptions{.size = head_dim_}));
    k_norm = register_module("k_norm", RMSNorm(RMSNormOptions{.size = head_dim_}));
  }
}

at::Tensor AttentionImpl::forward(const MixerInput& input) {
  return mix_packed(kName, input, options.hidden_size,
                    [&](const at::Tensor& hidden_states, const auto& cu_seqlens) {
                      return mix(hidden_states, cu_seqlens, input.cache);
                    });
}

at::Tensor AttentionImpl::mix(const at::Tensor& hidden_states,
                              const std::optional<at::Tensor>& cu_seqlens, LayerCache* cache) {
  const int64_t B = hidden_states.size(0), T = hidden_states.size(1);
  const int64_t N = cu_seqlens ? cu_seqlens->numel() - 1 : B;
  const bool continued = cache != nullptr && cache->attn_tokens.defined();
  if (continued) check_shape(kName, "cache.attn_tokens", cache->attn_tokens, {N}, "[N]");
  const auto cpu = at::TensorOptions(at::kLong);
  const at::Tensor lengths = cu_seqlens ? cu_seqlens->diff() : at::full({N}, T, cpu);
  const at::Tensor past = continued ? cache->attn_tokens : at::zeros({N}, cpu);

  at::Tensor q = q_proj(hidden_states).unflatten(-1, {-1, head_dim_});  // [B, T, heads, D]
  at::Tensor k = k_proj(hidden_states).unflatten(-1, {-1, head_dim_});  // [B, T, kv heads, D]
  at::Tensor v = v_proj(hidden_states).unflatten(-1, {-1, head_dim_});
  if (options.qk_norm) {
    q = q_norm(q);
    k = k_norm(k);
  }
  const at::Tensor shift = cu_seqlens ? past - cu_seqlens->narrow(0, 0, N) : past;
  const at::Tensor positions =
      at::arange(T, cpu) +
      (cu_seqlens ? shift.repeat_interleave(lengths).unsqueeze(0) : shift.unsqueeze(1));  // [B, T]
  const at::Tensor angles = rotary_.angles(positions.to(q.device()));
  q = RotaryEmbedding::rotate(q, angles).transpose(1, 2);  // [B, heads, T, D]
  k = RotaryEmbedding::rotate(k, angles).transpose(1, 2);
  v = v.transpose(1, 2);

  // Rows that have equally many tokens, as nearly always, go together; others one by one.
  const bool together = !cu_seqlens && (past == past[0]).all().item<bool>();
  const int64_t window = options.window_size.value_or(INT64_MAX);
  const int64_t columns = continued ? cache->attn_key.size(2) : 0;
  std::vector<at::Tensor> outputs, keys, values;
  for (int64_t n = 0; n < (together ? 1 : N); ++n) {
    const int64_t begin = cu_seqlens ? (*cu_seqlens)[n].item<int64_t>() : 0;
    const int64_t tokens = lengths[n].item<int64_t>();
    const int64_t cached = std::min(columns, past[n].item<int64_t>());
    const auto select = [&](const at::Tensor& x) {  // this row's new tokens
      if (together) return x;
      return cu_seqlens ? x.narrow(2, begin, tokens) : x.narrow(0, n, 1);
    };
    const auto extend = [&](const at::Tensor& old, const at::Tensor& x) {
      if (cached == 0) return select(x);
      const at::Tensor row = together ? old : old.narrow(0, n, 1);
      return at::cat({row.narrow(2, columns - cached, cached), select(x)}, 2);
    };
    const at::Tensor key = continued ? extend(cache->attn_key, k) : select(k);
    const at::Tensor value = continued ? extend(cache->attn_value, v) : select(v);
    outputs.push_back(causal_attention(select(q), key, value, window));
    if (cache != nullptr) {
      const int64_t kept = std::min(key.size(2), window - 1);
      keys.push_back(key.narrow(2, key.size(2) - kept, kept));
      values.push_back(value.narrow(2, key.size(2) - kept, kept));
    }
  }
  if (cache != nullptr) {
    cache->attn_key = stack_rows(keys);
    cache->attn_value = stack_rows(values);
    cache->attn_tokens = past + lengths;
  }
  const at::Tensor o = at::cat(outputs, cu_seqlens ? 2 : 0);  // [B, heads, T, D]
  return o_proj(o.transpose(1, 2).flatten(-2));
}

}  // namespace gdn
