// Products of large matrices by torch, in the way that is fastest for dtype and processor.
#pragma once

#include <cstdint>
#include <string_view>

#include <ATen/core/Tensor.h>

namespace gdn {

/// How a CPU multiplies matrices of one dtype, and why.
struct MatrixLibrary {
  std::string_view name;
  std::string_view reason;
  bool in_fp32 = false;  ///< the factors as fp32, the product rounded to their dtype
};

/// Products of fewer rows read the weights no faster in fp32.
inline constexpr int64_t kFewRows = 16;

/// Which way a product of `rows` rows goes; docs/cpu_kernels.md has the measurements behind it.
MatrixLibrary matrix_library(at::ScalarType dtype, bool is_x86, bool has_avx512,
                             int64_t rows = kFewRows);
/// On this processor.
MatrixLibrary matrix_library(at::ScalarType dtype, int64_t rows = kFewRows);

/// out [M, N] = a b, the factors as fp32: some columns of b at a time, so that their copy stays
/// small.
void product_in_fp32(at::Tensor& out, const at::Tensor& a, const at::Tensor& b);

/// a b, [M, K] and [K, N].
at::Tensor matrix_product(const at::Tensor& a, const at::Tensor& b);

/// out = a b.
void matrix_product_out(at::Tensor& out, const at::Tensor& a, const at::Tensor& b);

/// sum += a b. The sum may be fp32 where the factors are not.
void add_matrix_product(at::Tensor& sum, const at::Tensor& a, const at::Tensor& b);

/// x weight^T, [..., D] and [N, D].
at::Tensor linear_product(const at::Tensor& x, const at::Tensor& weight);

}  // namespace gdn
