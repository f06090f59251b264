// Tensors as the kernels' parameter structs take them.
#pragma once

#include <string_view>

#include <ATen/core/Tensor.h>

#include <gdn/kernels/types.h>

namespace gdn {

/// Rejects a tensor that is not fp32, bf16, fp16 or fp64.
void check_floating(std::string_view op, std::string_view argument, const at::Tensor& tensor);

/// Rejects a tensor of another dtype or on another device than `like`, which is argument `name`.
void check_like(std::string_view op, std::string_view argument, const at::Tensor& tensor,
                std::string_view name, const at::Tensor& like);

/// check_like for a parameter, which may also be fp32 when `like` is of less precision.
void check_parameter(std::string_view op, std::string_view argument, const at::Tensor& tensor,
                     std::string_view name, const at::Tensor& like);

/// The kernels' name of fp32, bf16, fp16 or fp64.
kernels::DType kernel_dtype(at::ScalarType dtype);

/// The dtype of statistics, losses and sums that go with data of `dtype`: fp32, or fp64 for fp64.
at::ScalarType statistics_dtype(at::ScalarType dtype);

/// x [..., D] as [M, D] with a contiguous last dimension: a view where strides allow, else a copy.
at::Tensor as_rows(const at::Tensor& x);

/// The tensor itself where its last dimension is contiguous, else a copy.
at::Tensor with_contiguous_rows(const at::Tensor& x);

inline kernels::ConstView2 const_view2(const at::Tensor& rows) {
  return {rows.const_data_ptr(), rows.stride(0)};
}
inline kernels::MutableView2 mutable_view2(const at::Tensor& rows) {
  return {rows.mutable_data_ptr(), rows.stride(0)};
}
inline kernels::ConstView3 const_view3(const at::Tensor& x) {
  return {x.const_data_ptr(), x.stride(0), x.stride(1)};
}
inline kernels::MutableView3 mutable_view3(const at::Tensor& x) {
  return {x.mutable_data_ptr(), x.stride(0), x.stride(1)};
}

}  // namespace gdn
