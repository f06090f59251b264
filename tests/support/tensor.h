// The comparison and the numerical gradient for tensors.
#pragma once

#include <span>
#include <string_view>
#include <support/compare.h>
#include <support/numerical_gradient.h>

#include <torch/torch.h>

namespace gdn::test {

/// expect_close for two tensors of one shape; positions in messages count in row-major order.
inline void expect_close(const at::Tensor& got, const at::Tensor& want, Tolerance tolerance,
                         std::string_view name) {
  ASSERT_TRUE(got.defined()) << name << ": got no tensor";
  ASSERT_EQ(got.sizes(), want.sizes()) << name << ": shape";
  const auto values = [](const at::Tensor& tensor) {
    return tensor.detach().to(at::kCPU, at::kDouble).contiguous();
  };
  const at::Tensor a = values(got);
  const at::Tensor b = values(want);
  const auto span = [](const at::Tensor& tensor) {
    return std::span(tensor.const_data_ptr<double>(), static_cast<size_t>(tensor.numel()));
  };
  expect_close(span(a), span(b), tolerance, name);
}

/// The largest magnitude; 0 of no elements.
inline double largest(const at::Tensor& x) {
  return x.numel() == 0 ? 0 : x.abs().max().item<double>();
}

/// expect_close within `relative` times the largest magnitude of `want`, which must be finite.
inline void expect_close_to_finite(const at::Tensor& got, const at::Tensor& want, double relative) {
  ASSERT_TRUE(want.isfinite().all().item<bool>()) << "expected tensor: not finite";
  expect_close(got, want, relative * largest(want), "tensor");
}

/// d loss() / d x by central differences. x is a contiguous fp64 tensor that `loss` reads; loss
/// returns a scalar tensor.
template <typename Loss>
at::Tensor numerical_gradient(const Loss& loss, const at::Tensor& x) {
  TORCH_CHECK(x.scalar_type() == at::kDouble && x.is_contiguous(), "x must be contiguous fp64");
  const at::NoGradGuard no_grad;
  const std::vector<double> gradient =
      numerical_gradient([&] { return loss().template item<double>(); },
                         std::span(x.detach().data_ptr<double>(), static_cast<size_t>(x.numel())));
  return torch::tensor(gradient, at::kDouble).view(x.sizes());
}

}  // namespace gdn::test
