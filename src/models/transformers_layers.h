// The Gated DeltaNet layers of the models that Hugging Face transformers knows: what config.json
// says of them, and which of their tensors hold which of ours.
#pragma once

#include <cstdint>
#include <filesystem>
#include <set>
#include <string>
#include <vector>

#include <gdn/layers/gated_deltanet.h>

namespace gdn {

struct TransformersLayers {
  /// Of the text model: "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text" or "olmo_hybrid".
  std::string model_type;
  std::vector<int64_t> layers;   ///< which layers are Gated DeltaNet, ascending
  GatedDeltaNetOptions options;  ///< the same for every layer
};

/// Reads a config.json; one with a text_config (Qwen3.5 with images) is read there. Throws
/// std::runtime_error that names the file and the key that is missing, unknown or not supported.
TransformersLayers read_transformers_config(const std::filesystem::path& file);

/// A parameter of our layer.
struct LayerTensor {
  std::string name;  ///< our state-dict key, "q_proj.weight"
  std::vector<int64_t> shape;
};

/// Tensors of one layer that hold the same numbers in both worlds. Theirs, one after another along
/// dimension 0, are `groups` equal blocks of rows; a block has an equal share of each of ours, in
/// order.
struct TensorGroup {
  std::vector<std::string> theirs;  ///< names behind "layers.N.linear_attn."
  std::vector<LayerTensor> ours;
  int64_t groups = 1;
};

/// All tensors of a layer. `stored` are the names that the checkpoint has: OLMo-Hybrid's hold the
/// convolution's weight in one tensor or in three.
std::vector<TensorGroup> tensor_groups(const TransformersLayers& model,
                                       const std::set<std::string>& stored);

}  // namespace gdn
