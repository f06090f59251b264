// What a model carries from one call to the next: constant in size for Gated DeltaNet layers.
#pragma once

#include <cstdint>
#include <vector>

#include <ATen/core/Tensor.h>

#include <gdn/layers/cache.h>

namespace gdn {

/// One LayerCache a layer. A default-constructed cache is empty, and the first forward fills it.
struct Cache {
  std::vector<LayerCache> layers;
  int64_t seen_tokens = 0;  ///< tokens of each row so far, padding included
  /// Of recurrent states: fp32, or on a CPU bf16, half as much to read and write for a token. It is
  /// rounded once a call, and the roundings add up: docs/benchmarks.md has what they cost.
  at::ScalarType state_dtype = at::kFloat;

  /// Bytes of all tensors in it.
  int64_t nbytes() const;
  /// Keeps the batch rows `index` [B'] (int64), in that order.
  void select_rows(const at::Tensor& index);
};

}  // namespace gdn
