// Model sizes by name.
#pragma once

#include <string_view>
#include <vector>

#include <gdn/models/config.h>

namespace gdn {

std::vector<std::string_view> preset_names();

/// Throws std::invalid_argument that lists the names. The vocabulary is the tokenizer's to set.
GatedDeltaNetConfig preset_config(std::string_view name);

}  // namespace gdn
