// What one layer carries from one call to the next when decoding.
#pragma once

#include <ATen/core/Tensor.h>

namespace gdn {

/// A Gated DeltaNet layer uses the first four tensors, an attention layer the others; the rest stay
/// undefined. A default-constructed cache is empty, and the first forward fills it.
struct LayerCache {
  at::Tensor recurrent_state;         ///< [B, HV, K, V] of state_dtype, fp64 in an fp64 model
  at::Tensor conv_q, conv_k, conv_v;  ///< [B, D, W - 1]; undefined without short convolution
  /// [B, kv heads, tokens, head dim], of a window only the last window - 1 tokens. Rows with fewer
  /// start with zeros: all end together.
  at::Tensor attn_key, attn_value;
  at::Tensor attn_tokens;                   ///< [B] int64 on the CPU: tokens of each row so far
  at::ScalarType state_dtype = at::kFloat;  ///< see Cache
};

}  // namespace gdn
