// What decoding carries from one call to the next: constant in size for GDN layers.
#pragma once

#include <cstdint>
#include <vector>

#include <ATen/core/Tensor.h>

namespace gdn {

/// The state of one layer. A GDN layer uses the first four tensors, an attention layer the last
/// two; the others stay undefined.
struct LayerCache {
  at::Tensor recurrent_state;         ///< [B, HV, K, V] fp32
  at::Tensor conv_q, conv_k, conv_v;  ///< [B, D, W - 1]; undefined without short convolution
  at::Tensor attn_key, attn_value;    ///< [B, kv heads, tokens (at most the window), head dim]
};

/// One LayerCache a layer. A default-constructed cache is empty, and the first forward fills it.
struct Cache {
  std::vector<LayerCache> layers;
  int64_t seen_tokens = 0;  ///< tokens of each row so far: the position of the next one

  /// Bytes of all tensors in it.
  int64_t nbytes() const;
  /// Keeps the batch rows `index` [B'] (int64), in that order.
  void select_rows(const at::Tensor& index);
};

}  // namespace gdn
