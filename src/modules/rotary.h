// Rotary position embedding (arXiv 2104.09864), pairing dimension i with i + D/2.
#pragma once

#include <cstdint>

#include <ATen/core/Tensor.h>

namespace gdn {

struct RotaryEmbeddingOptions {
  int64_t head_dim = 0;  ///< D, even
  double base = 10000.0;
};

/// Rotates by position; it has no parameters and keeps no table, so any position will do.
class RotaryEmbedding {
 public:
  explicit RotaryEmbedding(const RotaryEmbeddingOptions& options);

  /// The angles of `positions` [B or 1, T] int64: position * base^(-2i/D), [B or 1, T, 1, D/2]
  /// fp64, since fp32 loses the angle of far positions.
  at::Tensor angles(const at::Tensor& positions) const;
  /// x [B, T, heads, D] turned by angles(), computed in fp32, in x's dtype.
  static at::Tensor rotate(const at::Tensor& x, const at::Tensor& angles);

 private:
  RotaryEmbeddingOptions options_;
};

}  // namespace gdn
