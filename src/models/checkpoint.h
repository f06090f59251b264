// Model folders: config.json and model.safetensors, or shards with an index.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>

#include <c10/core/Device.h>
#include <c10/core/ScalarType.h>

#include <gdn/models/causal_lm.h>

namespace gdn {

inline constexpr int64_t kMaxShardBytes = 5'000'000'000;

/// Writes config.json and model.safetensors (above max_shard_bytes model-0000i-of-0000n.safetensors
/// and model.safetensors.index.json) into `folder`, which is made when missing. Atomic by file.
void save_pretrained(GatedDeltaNetForCausalLM& model, const std::filesystem::path& folder,
                     int64_t max_shard_bytes = kMaxShardBytes);

/// Loads a model folder of ours, of transformers with our classes, or of flash-linear-attention.
/// Without dtype the weights keep the checkpoint's. A_log and dt_bias are always fp32. With
/// int8_scale_size (see round_to_int8) matrices become int8 one after another, so that no more than
/// one is there in dtype. Throws std::runtime_error that names the file and the first missing or
/// unexpected key, or the key whose shape does not fit with both shapes.
GatedDeltaNetForCausalLM load_pretrained(const std::filesystem::path& folder,
                                         c10::Device device = c10::kCPU,
                                         std::optional<c10::ScalarType> dtype = std::nullopt,
                                         std::optional<int64_t> int8_scale_size = std::nullopt);

}  // namespace gdn
