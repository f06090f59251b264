#include <array>
#include <stdexcept>
#include <string>

#include <gdn/training/presets.h>

namespace gdn {
namespace {

struct Preset {
  std::string_view name;
  int64_t hidden_size, num_hidden_layers, num_heads, head_dim;
  bool tie_word_embeddings;
};

// Queries and keys take about three quarters of the width, values twice that, which gives a layer
// about as many parameters as one of attention.
constexpr std::array kPresets = {
    Preset{"tiny-byte", 256, 4, 3, 64, true},  // 4.0M parameters with the byte tokenizer
    Preset{"30M", 384, 8, 4, 64, true},        // 28.1M with a vocabulary of 32,000, as those below
    Preset{"125M", 768, 12, 9, 64, true},      // 123.9M
    Preset{"400M", 1024, 24, 6, 128, false},   // 424.6M
    Preset{"1.3B", 2048, 21, 6, 256, false},   // 1.387B
};

}  // namespace

std::vector<std::string_view> preset_names() {
  std::vector<std::string_view> names;
  for (const Preset& preset : kPresets) names.push_back(preset.name);
  return names;
}

GatedDeltaNetConfig preset_config(std::string_view name) {
  std::string names;
  for (const Preset& preset : kPresets) {
    names += (names.empty() ? "" : ", ") + std::string(preset.name);
    if (preset.name != name) continue;
    GatedDeltaNetConfig config;
    config.hidden_size = preset.hidden_size;
    config.num_hidden_layers = preset.num_hidden_layers;
    config.num_heads = preset.num_heads;
    config.head_dim = preset.head_dim;
    config.tie_word_embeddings = preset.tie_word_embeddings;
    return config;
  }
  throw std::invalid_argument("preset must be one of " + names + ", got '" + std::string(name) +
                              "'");
}

}  // namespace gdn
