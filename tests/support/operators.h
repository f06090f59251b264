// What the tests of differentiable operators ask of every operator.
#pragma once

#include <string>
#include <string_view>
#include <support/tensor.h>
#include <vector>

#include <ATen/Parallel.h>
#include <ATen/autocast_mode.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

namespace gdn::test {

using Tensors = std::vector<at::Tensor>;

inline constexpr double kHalfUlpBf16 = 1.0 / 256;  // relative to the number that is rounded
inline constexpr double kHalfUlpF16 = 1.0 / 2048;
/// What the roundings on the way to a result add up to in fp32. One that rounds a number to the
/// nearest has a root mean square of 0.42 half ulps relative to it; eight (an exponential, a
/// division or a root, products, what a sum leaves) have 1.2, and three times that is below 4.
inline constexpr double kFp32Roundings = 4.0 / (1 << 24);

/// bf16 autocast on the CPU for a scope.
class AutocastBf16 {
 public:
  AutocastBf16() {
    at::autocast::set_autocast_enabled(at::kCPU, true);
    at::autocast::set_autocast_dtype(at::kCPU, at::kBFloat16);
  }
  ~AutocastBf16() {
    at::autocast::set_autocast_enabled(at::kCPU, false);
    at::autocast::clear_cache();
  }
  AutocastBf16(const AutocastBf16&) = delete;
  AutocastBf16& operator=(const AutocastBf16&) = delete;
};

/// An output gradient for y: always the same numbers, which every floating dtype can represent.
inline at::Tensor output_gradient(const at::Tensor& y) {
  const auto generator = at::detail::createCPUGenerator(7);
  return torch::randn(y.sizes(), generator).to(at::kBFloat16).to(at::kHalf).to(y.scalar_type());
}

/// The output (one tensor) and the gradients of all floating inputs for that output gradient.
template <typename Operator>
Tensors output_and_gradients(const Operator& op, const Tensors& inputs) {
  Tensors leaves;
  Tensors differentiable;
  for (const at::Tensor& input : inputs) {
    leaves.push_back(input.detach());  // keeps the strides
    if (!input.is_floating_point()) continue;
    leaves.back().requires_grad_();
    differentiable.push_back(leaves.back());
  }
  const at::Tensor y = op(leaves);
  Tensors results = {y.detach()};
  for (const at::Tensor& gradient :
       torch::autograd::grad({y}, differentiable, {output_gradient(y)})) {
    results.push_back(gradient);
  }
  return results;
}

/// In fp32, bf16 and fp16: the output and every gradient of `op` are at most twice as far from the
/// plain expression in fp64 as the plain expression in the same dtype is, plus, where that happens
/// to be exact (a loss is but one number), what roundings on the way leave of the largest element:
/// kFp32Roundings, and in less precision, of which only the last one counts, half an ulp. fp64
/// inputs.
template <typename Operator, typename Plain>
void expect_matches_plain(const Operator& op, const Plain& plain, const Tensors& inputs,
                          const std::string& name) {
  struct Case {
    at::ScalarType dtype;
    double rounding;
  };
  for (const auto& [dtype, rounding] :
       {Case{at::kFloat, kFp32Roundings}, Case{at::kBFloat16, kHalfUlpBf16},
        Case{at::kHalf, kHalfUlpF16}}) {
    SCOPED_TRACE(name + " in " + c10::toString(dtype));
    Tensors low;
    Tensors exact;  // the rounded inputs
    for (const at::Tensor& input : inputs) {
      const bool floating = input.is_floating_point();
      low.push_back(floating ? input.to(dtype) : input);
      exact.push_back(floating ? low.back().to(at::kDouble) : input);
    }
    const Tensors got = output_and_gradients(op, low);
    const Tensors same_dtype = output_and_gradients(plain, low);
    const Tensors want = output_and_gradients(plain, exact);
    for (size_t i = 0; i < want.size(); ++i) {
      const double plain_error = largest(same_dtype[i].to(at::kDouble) - want[i]);
      expect_close(got[i], want[i], 2 * plain_error + rounding * largest(want[i]),
                   i == 0 ? std::string("output") : "gradient of input " + std::to_string(i - 1));
    }
  }
}

/// fp64 gradients of `op` against central differences. The inputs are contiguous fp64 tensors (or
/// integer ones, which have no gradient).
template <typename Operator>
void expect_gradients(const Operator& op, const Tensors& inputs, const std::string& name) {
  const Tensors got = output_and_gradients(op, inputs);
  const at::Tensor d_y = output_gradient(got[0]);
  size_t next = 1;
  for (size_t i = 0; i < inputs.size(); ++i) {
    if (!inputs[i].is_floating_point()) continue;
    const at::Tensor want = numerical_gradient([&] { return (op(inputs) * d_y).sum(); }, inputs[i]);
    // Truncation and rounding of central differences: see numerical_gradient.h.
    expect_close(got[next++], want, 1e-8 * std::max(largest(want), 1.0),
                 name + ", gradient of input " + std::to_string(i));
  }
}

/// Output and gradients are the same bits for two sets of inputs of equal values.
template <typename Operator>
void expect_same_bits(const Operator& op, const Tensors& a, const Tensors& b) {
  const Tensors from_a = output_and_gradients(op, a);
  const Tensors from_b = output_and_gradients(op, b);
  for (size_t i = 0; i < from_a.size(); ++i) {
    EXPECT_TRUE(torch::equal(from_a[i], from_b[i])) << "result " << i;
  }
}

/// One thread and two give the same bits.
template <typename Operator>
void expect_threads_agree(const Operator& op, const Tensors& inputs) {
  const int threads = at::get_num_threads();
  at::set_num_threads(1);
  const Tensors one = output_and_gradients(op, inputs);
  at::set_num_threads(2);
  const Tensors two = output_and_gradients(op, inputs);
  at::set_num_threads(threads);
  for (size_t i = 0; i < one.size(); ++i) {
    EXPECT_TRUE(torch::equal(one[i], two[i])) << "result " << i;
  }
}

/// On the meta device, output and gradients have the shapes and dtypes that they have on the CPU.
template <typename Operator>
void expect_meta_agrees(const Operator& op, const Tensors& inputs) {
  Tensors meta;
  for (const at::Tensor& input : inputs)
    meta.push_back(input.to(at::kMeta).requires_grad_(input.is_floating_point()));
  Tensors differentiable;
  for (const at::Tensor& input : meta) {
    if (input.requires_grad()) differentiable.push_back(input);
  }
  const at::Tensor y = op(meta);
  Tensors got = {y};
  for (const at::Tensor& gradient :
       torch::autograd::grad({y}, differentiable, {torch::empty_like(y)})) {
    got.push_back(gradient);
  }
  const Tensors want = output_and_gradients(op, inputs);
  ASSERT_EQ(got.size(), want.size());
  for (size_t i = 0; i < got.size(); ++i) {
    EXPECT_TRUE(got[i].is_meta()) << "result " << i;
    EXPECT_EQ(got[i].sizes(), want[i].sizes()) << "result " << i;
    EXPECT_EQ(got[i].scalar_type(), want[i].scalar_type()) << "result " << i;
  }
}

/// The call throws c10::ValueError with both texts in its message.
template <typename Call>
void expect_rejected(const Call& call, std::string_view first, std::string_view second) {
  try {
    call();
  } catch (const c10::ValueError& error) {
    const std::string message = error.what_without_backtrace();
    EXPECT_NE(message.find(first), std::string::npos) << message;
    EXPECT_NE(message.find(second), std::string::npos) << message;
    return;
  } catch (const std::exception& error) {
    ADD_FAILURE() << "expected c10::ValueError, got " << error.what();
    return;
  }
  ADD_FAILURE() << "nothing was thrown; expected '" << first << "'";
}

}  // namespace gdn::test
