// The linear map of a decoding step: what it composes, its layout, and its errors.
#include <support/operators.h>
#include <support/tensor.h>

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <gdn/ops/common/causal_conv1d.h>
#include <gdn/ops/common/int8_weight.h>
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

TEST_F(SmallBatchLinear, WeightsOfInt8AreTheNearestNumbersWithTheirScales) {
  for (const int64_t Q : {0, 32, 128}) {
    const at::Tensor weight = random({5, 100});
    const Int8Weight rounded = round_to_int8(weight, Q);
    const int64_t size = Q == 0 ? 100 : std::min<int64_t>(Q, 100);
    ASSERT_EQ(rounded.scales.sizes(), at::IntArrayRef({5, (100 + size - 1) / size}));
    const at::Tensor back = from_int8(rounded, at::kDouble);
    for (int64_t n = 0; n < 5; ++n) {
      for (int64_t i = 0; i < 100; ++i) {
        const double scale = rounded.scales[n][i / size].item<double>();
        EXPECT_LE(std::abs((back[n][i] - weight[n][i]).item<double>()), 0.5001 * scale);
        EXPECT_LE(std::abs(rounded.values[n][i].item<int>()), 127);
      }
    }
    EXPECT_EQ(rounded.values.abs().amax().item<int>(), 127);
  }
  EXPECT_TRUE(
      at::equal(from_int8(round_to_int8(at::zeros({2, 40}), 32), at::kFloat), at::zeros({2, 40})));
}

TEST_F(SmallBatchLinear, TakesWeightsOfInt8WithAnyNumberOfRows) {
  const Int8Weight rounded = round_to_int8(random({kN, 100}), 32);
  const at::Tensor weight = from_int8(rounded, at::kDouble);
  for (const int64_t rows : {1, 16, 17, 40}) {
    const at::Tensor x = random({rows, 100});
    const at::Tensor got = small_batch_linear(x.to(at::kFloat), rounded.values,
                                              {.scales = rounded.scales, .swiglu = true});
    const at::Tensor y = x.matmul(weight.t());
    const at::Tensor want = torch::silu(y.narrow(1, 0, kN / 2)) * y.narrow(1, kN / 2, kN / 2);
    expect_close_to_finite(got, want, 100 * kFp32Roundings);
  }
}

/// Few rows take the SIMD kernel, which is no further from fp64 than the operators for many rows.
TEST_F(SmallBatchLinear, FewRowsMatchManyInEachDtype) {
  const at::Tensor norm = random({kG}), gate = random({kM, kD}), residual = random({kM, kN});
  for (const auto dtype : {at::kFloat, at::kBFloat16, at::kHalf}) {
    const auto to = [&](const at::Tensor& x) { return x.to(dtype); };
    const auto run = [&](const at::Tensor& x, const at::Tensor& g, const at::Tensor& r) {
      return small_batch_linear(
          x, to(weight_).to(x.scalar_type()),
          {.norm_weight = to(norm).to(x.scalar_type()), .eps = kEps, .gate = g, .residual = r});
    };
    const at::Tensor exact =
        run(to(x_).to(at::kDouble), to(gate).to(at::kDouble), to(residual).to(at::kDouble));
    const auto repeat = [](const at::Tensor& x) { return x.repeat({6, 1}); };  // 18 rows
    const at::Tensor few = run(to(x_), to(gate), to(residual));
    const at::Tensor many =
        run(repeat(to(x_)), repeat(to(gate)), repeat(to(residual))).narrow(0, 0, kM);
    const double rounding = dtype == at::kFloat  ? kFp32Roundings
                            : dtype == at::kHalf ? kHalfUlpF16
                                                 : kHalfUlpBf16;
    test::expect_close(few, exact,
                       largest(many.to(at::kDouble) - exact) + rounding * largest(exact), "y");
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
  const Int8Weight rounded = round_to_int8(weight_, 0);
  expect({.scales = rounded.scales}, "weight", "int8 on a CPU");
  const auto expect_scales = [&](const at::Tensor& scales, const char* expected) {
    expect_rejected([&] { small_batch_linear(x_, rounded.values, {.scales = scales}); }, "scales",
                    expected);
  };
  expect_rejected([&] { small_batch_linear(x_, rounded.values); }, "weight", "Double");
  expect_scales(random({kN, 1}), "float32 on a CPU");
  expect_scales(at::ones({kN + 1, 1}), "[10, -1]");
  expect_scales(at::ones({kN, 2}), "1 or ceil(D / Q) columns");
  expect_rejected([&] { round_to_int8(weight_, 48); }, "scale_size", "a power of two");
  expect_rejected([&] { round_to_int8(weight_ / 0, 32); }, "weight", "finite numbers");
  weight_.requires_grad_();
  expect({}, "every tensor", "without gradient");
}

}  // namespace
}  // namespace gdn::test
