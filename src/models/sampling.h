// From logits to tokens.
#pragma once

#include <cstdint>
#include <random>

#include <ATen/core/Tensor.h>

#include <gdn/models/generate.h>

namespace gdn {

/// The generator of one row: a function of seed and row alone.
std::mt19937_64 row_generator(uint64_t seed, int64_t row);

/// In [0, 1) with 53 bits; the standard library's distributions differ from system to system.
double uniform(std::mt19937_64& generator);

/// A token for each row of logits [B, vocab], int64 [B] on their device: drawn by temperature,
/// top_k and top_p with the row's number in [0, 1) of `uniforms` [B] fp64, or greedily at
/// temperature 0, the first of the largest. -1 for a row whose logits are not all finite.
at::Tensor sample_tokens(const at::Tensor& logits, const at::Tensor& uniforms,
                         const GenerateOptions& options);

}  // namespace gdn
