// What one layer carries from one call to the next when decoding.
#pragma once

#include <ATen/core/Tensor.h>

namespace gdn {

/// A Gated DeltaNet layer uses the first four tensors, an attention layer the others; the rest stay
/// undefined. A default-constructed cache is empty, and the first forward fills it.
struct LayerCache {
  at::Tensor recurrent_state;         ///< [B, HV, K, V] fp32
  at::Tensor conv_q, conv_k, conv_v;  ///< [B, D, W - 1]; undefined without short convolution
  /// [B, kv heads, tokens (at most the window), head dim]; rows with fewer tokens end together and
  /// start with zeros.
  at::Tensor attn_key, attn_value;
  at::Tensor attn_tokens;  ///< [B] int64 on the CPU: tokens of each row so far
};

}  // namespace gdn
