#include <string>

#include <ATen/ATen.h>

#include <gdn/ops/utils/check.h>
#include <gdn/ops/utils/views.h>

namespace gdn {

void check_floating(std::string_view op, std::string_view argument, const at::Tensor& tensor) {
  if (!tensor.defined()) reject(op, argument, "a tensor", describe(tensor));
  switch (tensor.scalar_type()) {
    case at::kFloat:
    case at::kBFloat16:
    case at::kHalf:
    case at::kDouble:
      return;
    default:
      reject(op, argument, "Float, BFloat16, Half or Double", describe(tensor));
  }
}

void check_like(std::string_view op, std::string_view argument, const at::Tensor& tensor,
                std::string_view name, const at::Tensor& like) {
  if (!tensor.defined() || tensor.scalar_type() != like.scalar_type() ||
      tensor.device() != like.device()) {
    reject(op, argument,
           std::string(c10::toString(like.scalar_type())) + " on " + like.device().str() +
               " like " + std::string(name),
           describe(tensor));
  }
}

void check_parameter(std::string_view op, std::string_view argument, const at::Tensor& tensor,
                     std::string_view name, const at::Tensor& like) {
  const bool fp32 = tensor.defined() && tensor.scalar_type() == at::kFloat &&
                    like.scalar_type() != at::kDouble && tensor.device() == like.device();
  if (!fp32) check_like(op, argument, tensor, name, like);
}

kernels::DType kernel_dtype(at::ScalarType dtype) {
  switch (dtype) {
    case at::kBFloat16:
      return kernels::DType::bf16;
    case at::kHalf:
      return kernels::DType::f16;
    case at::kDouble:
      return kernels::DType::f64;
    default:
      return kernels::DType::f32;
  }
}

at::ScalarType statistics_dtype(at::ScalarType dtype) {
  return dtype == at::kDouble ? at::kDouble : at::kFloat;
}

at::Tensor as_rows(const at::Tensor& x) {
  const int64_t D = x.size(-1);
  int64_t M = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) M *= x.size(i);
  return with_contiguous_rows(x.reshape({M, D}));
}

at::Tensor with_contiguous_rows(const at::Tensor& x) {
  return x.size(-1) <= 1 || x.stride(-1) == 1 ? x : x.contiguous();
}

}  // namespace gdn
