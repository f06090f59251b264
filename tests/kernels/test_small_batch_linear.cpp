// The linear map of few rows on a CPU against its equations (kernels/small_batch_linear.h) in fp64.
#include <optional>
#include <support/kernel.h>

#include <gtest/gtest.h>

#include <gdn/kernels/cpu/small_batch_linear.h>

namespace gdn::test {
namespace {

using namespace kernels;  // NOLINT(google-build-using-namespace)
using reference::silu;

constexpr int64_t kTaps = 4;
constexpr double kEps = 1e-3;

enum class Around { nothing, residual, swiglu, convolution };

/// A request with inputs of its own. Rows of x, gate, residual and y have gaps of NaN between them.
struct Problem {
  int64_t M, N, D;
  DType dtype;
  Around around = Around::nothing;
  int64_t norm_size = 0;   // 0: no norm
  bool gated = false;      // and a bias in the convolution
  int64_t scale_size = 0;  // 0: a weight of dtype

  int64_t weight_rows() const { return around == Around::swiglu ? 2 * N : N; }
  int64_t groups() const { return (D + scale_size - 1) / scale_size; }
  int64_t channels() const { return (N + 1) / 2; }

  Buffer x = Buffer::random(dtype, M, D, D + 3, 1);
  Buffer gate = Buffer::random(dtype, M, D, D + 5, 2);
  Buffer weight = Buffer::random(dtype, weight_rows() * D, 3);
  Buffer norm_weight = Buffer::random(dtype, std::max<int64_t>(norm_size, 1), 4);
  Buffer residual = Buffer::random(dtype, M, N, N + 1, 5);
  Buffer taps = Buffer::random(dtype, channels() * kTaps, 6);
  Buffer bias = Buffer::random(dtype, channels(), 7);
  Buffer state = Buffer::random(dtype, M* channels() * (kTaps - 1), 8);
  std::vector<int8_t> whole = {};
  std::vector<float> scales = {};

  void make_int8() {
    std::mt19937 generator(9);
    std::uniform_int_distribution<int> number(-127, 127);
    std::uniform_real_distribution<float> scale(0.001F, 0.02F);
    whole.resize(static_cast<size_t>(weight_rows() * D));
    scales.resize(static_cast<size_t>(weight_rows() * groups()));
    for (int8_t& value : whole) value = static_cast<int8_t>(number(generator));
    for (float& value : scales) value = scale(generator);
  }

  double weight_at(int64_t n, int64_t i) const {
    if (scale_size == 0) return weight[n * D + i];
    return static_cast<double>(whole[n * D + i]) *
           static_cast<double>(scales[n * groups() + i / scale_size]);
  }
};

struct Result {
  Buffer y, state;
};

Result simd(const Problem& problem, ParallelFor parallel_for, int64_t first = 0,
            std::optional<int64_t> rows = std::nullopt) {
  const auto row = [&](const Buffer& buffer, int64_t stride) {
    return ConstView2{
        static_cast<const std::byte*>(buffer.data()) + first * stride * bytes_of(buffer.dtype()),
        stride};
  };
  const int64_t M = rows.value_or(problem.M), channels = problem.channels();
  Result result = {Buffer(problem.dtype, M * (problem.N + 7)),
                   Buffer(problem.dtype, M * channels * (kTaps - 1))};
  for (int64_t i = 0; i < result.state.size(); ++i) {
    result.state.set(i, problem.state[first * channels * (kTaps - 1) + i]);
  }
  SmallBatchLinear p;
  p.M = M;
  p.N = problem.N;
  p.D = problem.D;
  p.dtype = problem.dtype;
  p.x = row(problem.x, problem.D + 3);
  p.weight = problem.weight.data();
  if (problem.scale_size != 0) {
    p.weight = problem.whole.data();
    p.scales = problem.scales.data();
    p.scale_size = problem.scale_size;
  }
  if (problem.norm_size != 0) {
    p.norm_weight = problem.norm_weight.data();
    p.norm_size = problem.norm_size;
    p.eps = kEps;
    if (problem.gated) p.gate = row(problem.gate, problem.D + 5);
  }
  if (problem.around == Around::residual) p.residual = row(problem.residual, problem.N + 1);
  p.swiglu = problem.around == Around::swiglu;
  if (problem.around == Around::convolution) {
    p.channels = channels;
    p.taps = kTaps;
    p.conv_weight = problem.taps.data();
    if (problem.gated) p.conv_bias = problem.bias.data();
    p.conv_state = result.state.data();
  }
  p.y = {result.y.data(), problem.N + 7};
  p.parallel_for = parallel_for;
  cpu::small_batch_linear(p);
  return result;
}

struct Expected {
  std::vector<double> y, state;
  double slack = 0;  // bounds what roundings of fp32 on the way to an element of y add up to
};

Expected expected(const Problem& p) {
  const int64_t C = p.channels(), G = p.norm_size == 0 ? p.D : p.norm_size;
  Expected result = {Buffer(p.dtype, p.M * (p.N + 7)).values(), p.state.values()};
  for (int64_t m = 0; m < p.M; ++m) {
    std::vector<double> z(p.D), y(p.weight_rows()), magnitude(p.weight_rows());
    for (int64_t i = 0; i < p.D; ++i) {
      z[i] = p.x[m * (p.D + 3) + i];
      if (p.norm_size == 0) continue;
      double squares = 0;
      for (int64_t j = i / G * G; j < (i / G + 1) * G; ++j) {
        squares += p.x[m * (p.D + 3) + j] * p.x[m * (p.D + 3) + j];
      }
      z[i] *= p.norm_weight[i % G] / std::sqrt(squares / static_cast<double>(G) + kEps);
      if (p.gated) z[i] *= silu(p.gate[m * (p.D + 5) + i]);
    }
    for (int64_t n = 0; n < p.weight_rows(); ++n) {
      for (int64_t i = 0; i < p.D; ++i) {
        y[n] += p.weight_at(n, i) * z[i];
        magnitude[n] += std::fabs(p.weight_at(n, i) * z[i]);
      }
    }
    for (int64_t n = 0; n < p.N; ++n) {
      double& out = result.y[m * (p.N + 7) + n];
      out = y[n];
      double size = magnitude[n];  // of what the result is made of
      if (p.around == Around::residual) {
        out += p.residual[m * (p.N + 1) + n];
        size += std::fabs(p.residual[m * (p.N + 1) + n]);
      }
      if (p.around == Around::swiglu) {
        out = silu(y[n]) * y[p.N + n];
        size = 1.1 * magnitude[n] * (1 + magnitude[p.N + n]);  // 1.1: the slope of silu
      }
      if (p.around == Around::convolution && n < C) {
        double* past = result.state.data() + (m * C + n) * (kTaps - 1);
        double sum = p.gated ? p.bias[n] : 0;
        const auto tap = [&](int64_t w) { return p.taps[n * kTaps + w]; };
        for (int64_t w = 0; w < kTaps - 1; ++w) sum += tap(w) * past[w];
        out = silu(sum + tap(kTaps - 1) * y[n]);
        size = 1.1 * (3 + magnitude[n] * (1 + std::fabs(tap(kTaps - 1))));
        std::copy(past + 1, past + kTaps - 1, past);
        past[kTaps - 2] = y[n];
      }
      // A product, a sum of D, and some for the norm, the gate and silu.
      const double roundings = static_cast<double>(p.D) + 24;
      result.slack = std::max(result.slack, roundings * half_ulp(DType::f32) * size);
    }
  }
  return result;
}

void expect_matches(const Problem& problem) {
  const Expected want = expected(problem);
  const Tolerance tolerance{want.slack + std::ldexp(1.0, -25), 1.01 * half_ulp(problem.dtype)};
  for_each_target([&] {
    const Result got = simd(problem, serial_for);
    expect_close(got.y.values(), want.y, tolerance, "y");
    if (problem.around == Around::convolution) {
      expect_close(got.state.values(), want.state, tolerance, "state");
    }
  });
}

struct Size {
  int64_t M, N, D, G;
};
constexpr Size kSizes[] = {{1, 1, 1, 1},    {1, 37, 7, 7},    {1, 70, 300, 50},
                           {2, 33, 64, 32}, {3, 35, 40, 8},   {4, 66, 129, 43},
                           {5, 34, 96, 32}, {8, 9, 257, 257}, {16, 40, 77, 11}};

class SmallBatchLinearKernel : public testing::TestWithParam<DType> {};

TEST_P(SmallBatchLinearKernel, MatchesTheEquations) {
  for (const Size& size : kSizes) {
    for (const Around around :
         {Around::nothing, Around::residual, Around::swiglu, Around::convolution}) {
      for (const int64_t norm : {int64_t{0}, size.G}) {
        for (const int64_t scale : {int64_t{0}, int64_t{32}, int64_t{128}, size.D}) {
          SCOPED_TRACE("M " + std::to_string(size.M) + " N " + std::to_string(size.N) + " D " +
                       std::to_string(size.D) + " around " +
                       std::to_string(static_cast<int>(around)) + " G " + std::to_string(norm) +
                       " Q " + std::to_string(scale));
          Problem problem{.M = size.M,
                          .N = size.N,
                          .D = size.D,
                          .dtype = GetParam(),
                          .around = around,
                          .norm_size = norm,
                          .gated = norm != 0,
                          .scale_size = scale};
          if (scale != 0) problem.make_int8();
          expect_matches(problem);
        }
      }
    }
  }
}

TEST_P(SmallBatchLinearKernel, NeitherThreadsNorOtherRowsChangeBits) {
  for (const int64_t scale : {0, 64}) {
    for (const Around around : {Around::residual, Around::convolution, Around::swiglu}) {
      Problem problem{.M = 7,
                      .N = 203,
                      .D = 160,
                      .dtype = GetParam(),
                      .around = around,
                      .norm_size = 160,
                      .scale_size = scale};
      if (scale != 0) problem.make_int8();
      const Result one = simd(problem, serial_for);
      const Result two = simd(problem, backwards_on_two_threads);
      EXPECT_TRUE(one.y.same_bytes(two.y));
      EXPECT_TRUE(one.state.same_bytes(two.state));
      const int64_t stride = problem.N + 7;
      for (int64_t m = 0; m < problem.M; ++m) {
        const Result alone = simd(problem, serial_for, m, 1);
        for (int64_t n = 0; n < problem.N; ++n) {
          ASSERT_EQ(alone.y[n], one.y[m * stride + n]) << "row " << m << " output " << n;
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Dtypes, SmallBatchLinearKernel,
                         testing::Values(DType::f32, DType::bf16, DType::f16));

}  // namespace
}  // namespace gdn::test
