// What every token mixer takes.
#pragma once

#include <optional>

#include <ATen/core/Tensor.h>

#include <gdn/layers/cache.h>

namespace gdn {

struct MixerInput {
  at::Tensor hidden_states;  ///< [B, T, hidden_size]
  /// [B, T], 0 for padding on the left: it changes neither states nor later outputs, and its own
  /// outputs are 0.
  std::optional<at::Tensor> attention_mask = std::nullopt;
  /// [N + 1]: B is 1 and holds N sequences one after another; excludes attention_mask.
  std::optional<at::Tensor> cu_seqlens = std::nullopt;
  /// Read and updated: B rows, or N with cu_seqlens.
  LayerCache* cache = nullptr;
};

}  // namespace gdn
