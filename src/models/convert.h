// Gated DeltaNet layers' weights from transformers' model folders into ours, and back.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

namespace gdn {

/// model_type of the folders that convert_from_transformers writes.
inline constexpr const char* kLayersModelType = "gated_deltanet_layers";

struct Conversion {
  std::string model_type;       ///< transformers' name of the text model
  std::vector<int64_t> layers;  ///< those converted
  size_t tensors = 0;           ///< of ours
  size_t others = 0;            ///< tensors of the transformers model that are not converted
};

/// Whether the folder's config.json has model_type kLayersModelType.
bool holds_layers(const std::filesystem::path& folder);

/// Reads the Gated DeltaNet layers of a Qwen3-Next, Qwen3.5 or OLMo-Hybrid model folder and writes
/// a new folder `out`:
///   config.json         the arguments of our GatedDeltaNet layer, and `layers`, their indices
///   model.safetensors   model.layers.N.attn.KEY, with our layer's state-dict keys
/// The numbers and their dtypes are kept as they are. Attention, MLPs, experts, norms between
/// layers, embeddings and vision towers are not converted. Throws std::runtime_error that names the
/// file and the tensor or key that is missing, unknown, of another shape or not of floating-point
/// numbers; and where `out` exists.
Conversion convert_from_transformers(const std::filesystem::path& model,
                                     const std::filesystem::path& out);

/// Writes a copy `out` of the transformers model folder `base` whose Gated DeltaNet layers have the
/// weights of `layers`, as the function above wrote them; nothing else differs. Weights of another
/// dtype than the base's are rounded to that. The two must have the same settings and layers.
Conversion convert_to_transformers(const std::filesystem::path& layers,
                                   const std::filesystem::path& base,
                                   const std::filesystem::path& out);

}  // namespace gdn
