// From one position's logits to a token.
#pragma once

#include <cstdint>
#include <random>
#include <span>

#include <gdn/models/generate.h>

namespace gdn {

/// The generator of one row: a function of seed and row alone.
std::mt19937_64 row_generator(uint64_t seed, int64_t row);

/// Draws a token by temperature, top_k and top_p (greedily at temperature 0: the first of the
/// largest). Throws std::runtime_error when the logits are not finite.
int64_t sample_token(std::span<const float> logits, const GenerateOptions& options,
                     std::mt19937_64& generator);

}  // namespace gdn
