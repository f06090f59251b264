// Weights rounded to int8: symmetric, with a scale for each row, or for groups of a row's inputs.
#pragma once

#include <cstdint>
#include <string_view>

#include <ATen/core/Tensor.h>

namespace gdn {

/// weight_{n i} = values_{n i} scales_{n, i / Q}, Q a power of two of at least 32, or D.
struct Int8Weight {
  at::Tensor values;  ///< [N, D] int8, from -127 to 127
  at::Tensor scales;  ///< [N, ceil(D / Q)] fp32
};

/// What scale_size, and so the command's --weight-group, may be.
inline constexpr std::string_view kInt8ScaleSizes = "0 or a power of two of at least 32";
bool is_int8_scale_size(int64_t scale_size);

/// Q: all that have so many groups mean the same.
int64_t int8_scale_size(int64_t D, int64_t groups);

/// The nearest numbers to weight [N, D] (floating point) that have scales for groups of
/// `scale_size` inputs, 0: for rows. Throws c10::ValueError where scale_size is none of these, or
/// the weight is not finite.
Int8Weight round_to_int8(const at::Tensor& weight, int64_t scale_size);

/// [N, D] in `dtype`.
at::Tensor from_int8(const Int8Weight& weight, at::ScalarType dtype);

/// x [..., D] times the weight: y [..., N] in x's dtype, for any number of rows. No more than some
/// rows of the weight are there in x's dtype at a time.
at::Tensor int8_linear(const at::Tensor& x, const Int8Weight& weight);

/// Throws c10::ValueError unless these are an int8 weight [N, D] for x on a CPU.
void check_int8_weight(std::string_view op, const at::Tensor& weight, const at::Tensor& scales,
                       const at::Tensor& x);

}  // namespace gdn
