// The linear map of a decoding step: what it composes, its layout, and its errors.
#include <support/operators.h>
#include <support/tensor.h>

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <gdn/ops/common/causal_conv1d.h>
#include <gdn/ops/common/small_batch_linear.h>

namespace gdn::test {
namespace {

constexpr int64_t kM = 3, kN = 10, kD = 24, kG = 8;
constexpr double kEps = 1e-3;

class SmallBatchLinear : public testing::Test {
 protected:
  void SetUp() override { torch::manual_seed(1); }

  at::Tensor random(at::IntArrayRef sizes) { return torch::randn(sizes, at::kDouble); }

  at::Tensor x_ = torch::randn({kM, kD}, at::kDouble);
  at::Tensor weight_ = torch::randn({kN, kD}, at::kDouble);
};

void expect_equal(const at::Tensor& got, const at::Tensor& want) {
  EXPECT_TRUE(at::allclose(got, want, 1e-12, 1e-12)) << got << want;
}

/// Each kG neighbours of x over their root mean square, in plain torch.
at::Tensor grouped_norm(const at::Tensor& x, const at::Tensor& weight) {
  const at::Tensor groups = x.reshape({kM, kD / kG, kG});
  const at::Tensor square = groups.square().mean(-1, /*keepdim=*/true);
  return (groups / (square + kEps).sqrt() * weight).reshape({kM, kD});
}

TEST_F(SmallBatchLinear, MultipliesWhatTheNormAndTheGateLeave) {
  const at::Tensor norm = random({kG}), gate = random({kM, kD}), residual = random({kM, kN});
  const at::Tensor normed = grouped_norm(x_, norm);
  expect_equal(small_batch_linear(x_, weight_), x_.matmul(weight_.t()));
  expect_equal(small_batch_linear(x_, weight_, {.norm_weight = norm, .eps = kEps}),
               normed.matmul(weight_.t()));
  expect_equal(
      small_batch_linear(x_, weight_,
                         {.norm_weight = norm, .eps = kEps, .gate = gate, .residual = residual}),
      (normed * torch::silu(gate)).matmul(weight_.t()) + residual);
}

TEST_F(SmallBatchLinear, SwigluTakesTheWeightsHalves) {
  const at::Tensor y = x_.matmul(weight_.t());
  expect_equal(small_batch_linear(x_, weight_, {.swiglu = true}),
               torch::silu(y.narrow(1, 0, kN / 2)) * y.narrow(1, kN / 2, kN / 2));
}

TEST_F(SmallBatchLinear, TheConvolutionTakesTheFirstOutputs) {
  constexpr int64_t kC = 6, kW = 4;
  const at::Tensor taps = random({kC, kW}), bias = random({kC}), state = random({kM, kC, kW - 1});
  const at::Tensor inputs = x_.matmul(weight_.t());
  at::Tensor updated = state.clone(), expected = state.clone();
  const at::Tensor y = small_batch_linear(
      x_, weight_, {.conv_weight = taps, .conv_bias = bias, .conv_state = updated});
  expect_equal(y.narrow(1, 0, kC), causal_conv1d_update(inputs.narrow(1, 0, kC), expected, taps,
                                                        bias, Activation::silu));
  expect_equal(y.narrow(1, kC, kN - kC), inputs.narrow(1, kC, kN - kC));
  expect_equal(updated, expected);
  expect_equal(updated.select(2, kW - 2), inputs.narrow(1, 0, kC));
}

TEST_F(SmallBatchLinear, RowsStartAtMultiplesOf16Bytes) {
  for (const auto dtype : {at::kDouble, at::kFloat, at::kBFloat16}) {
    const int64_t unit = 16 / static_cast<int64_t>(c10::elementSize(dtype));
    for (const int64_t N : {1, 7, 8, 9}) {
      const at::Tensor y = small_batch_linear(x_.to(dtype), random({N, kD}).to(dtype));
      EXPECT_EQ(y.stride(0), (N + unit - 1) / unit * unit) << N << " " << dtype;
    }
  }
}

TEST_F(SmallBatchLinear, RejectsWhatDoesNotFit) {
  const auto expect = [&](const SmallBatchLinearOptions& options, const char* argument,
                          const char* expected) {
    expect_rejected([&] { small_batch_linear(x_, weight_, options); }, argument, expected);
  };
  expect_rejected([&] { small_batch_linear(x_, random({4, 5})); }, "weight", "[N, D] = [-1, 24]");
  expect_rejected([&] { small_batch_linear(x_, weight_.to(at::kFloat)); }, "weight", "Double");
  expect({.norm_weight = random({7})}, "norm_weight", "a divisor of D");
  expect({.gate = x_}, "gate", "absent without norm_weight");
  expect({.residual = x_}, "residual", "[3, 10]");
  expect({.residual = random({kM, kN / 2}), .swiglu = true}, "residual", "absent with swiglu");
  expect({.conv_weight = random({6, 4})}, "conv_state", "given with conv_weight");
  expect({.conv_state = random({3, 6, 3})}, "conv_state", "absent without conv_weight");
  expect({.conv_weight = random({11, 4}), .conv_state = random({3, 11, 3})}, "conv_weight",
         "1 <= C <= N");
  expect({.conv_weight = random({6, 4}), .conv_state = random({3, 6, 2})}, "conv_state",
         "[3, 6, 3]");
  expect({.swiglu = true, .conv_weight = random({5, 4})}, "conv_weight", "absent with swiglu");
  weight_.requires_grad_();
  expect({}, "every tensor", "without gradient");
}

}  // namespace
}  // namespace gdn::test
