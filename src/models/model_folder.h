// What any model folder holds, ours or transformers': config.json, and weights in one file or in
// shards with an index.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <string>

#include <ATen/core/Tensor.h>
#include <nlohmann/json_fwd.hpp>

namespace gdn {

inline constexpr const char* kConfigFile = "config.json";
inline constexpr const char* kWeightsFile = "model.safetensors";
inline constexpr const char* kIndexFile = "model.safetensors.index.json";

/// Throws std::runtime_error that names the file where it cannot be read or is not JSON.
nlohmann::json read_json(const std::filesystem::path& file);

/// Indented, atomically. Throws std::runtime_error that names the file.
void write_json(const std::filesystem::path& file, const nlohmann::json& value);

/// "[3, 4]", for messages.
std::string shape_text(at::IntArrayRef shape);

/// A tensor of a checkpoint and the file that holds it.
struct StoredTensor {
  at::Tensor tensor;  ///< read-only
  std::filesystem::path file;
  uint64_t offset = 0;  ///< of its first byte in the file
};

/// The weights of a folder by name, and in `listed` the file that lists them, for messages. Throws
/// std::runtime_error that names the file where one is missing, malformed or at odds with the
/// index.
std::map<std::string, StoredTensor> read_weights(const std::filesystem::path& folder,
                                                 std::filesystem::path& listed);

}  // namespace gdn
