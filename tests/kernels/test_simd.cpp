// Loads, stores and activation functions of simd-inl.h under every instruction set.
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <support/compare.h>
#include <support/targets.h>
#include <vector>

#include <gtest/gtest.h>

#include <gdn/kernels/reference/element.h>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/test_simd.cpp"
#include <hwy/foreach_target.h>  // IWYU pragma: keep

#include <gdn/kernels/cpu/simd-inl.h>

HWY_BEFORE_NAMESPACE();
namespace gdn::test::HWY_NAMESPACE {
namespace simd = gdn::kernels::cpu::HWY_NAMESPACE;
namespace hn = hwy::HWY_NAMESPACE;

void bf16_to_f32(const uint16_t* from, float* to, int64_t n) {
  simd::ConvertElements(reinterpret_cast<const hwy::bfloat16_t*>(from), to, n);
}
void f16_to_f32(const uint16_t* from, float* to, int64_t n) {
  simd::ConvertElements(reinterpret_cast<const hwy::float16_t*>(from), to, n);
}
void f32_to_bf16(const float* from, uint16_t* to, int64_t n) {
  simd::ConvertElements(from, reinterpret_cast<hwy::bfloat16_t*>(to), n);
}
void f32_to_f16(const float* from, uint16_t* to, int64_t n) {
  simd::ConvertElements(from, reinterpret_cast<hwy::float16_t*>(to), n);
}

// Writes exp, sigmoid, silu, its derivative and softplus of x to y[0..4].
void activations(const float* x, float* const* y, int64_t n) {
  const hn::ScalableTag<float> d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  for (int64_t i = 0; i < n; i += lanes) {
    const auto v = simd::LoadF32(d, x + i, n - i);
    simd::StoreF32(d, simd::SafeExp(d, v), y[0] + i, n - i);
    simd::StoreF32(d, simd::Sigmoid(d, v), y[1] + i, n - i);
    simd::StoreF32(d, simd::Silu(d, v), y[2] + i, n - i);
    simd::StoreF32(d, simd::SiluGradient(d, v, simd::Sigmoid(d, v)), y[3] + i, n - i);
    simd::StoreF32(d, simd::Softplus(d, v), y[4] + i, n - i);
  }
}

}  // namespace gdn::test::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace gdn::test {
namespace {

using kernels::DType;

HWY_EXPORT(bf16_to_f32);
HWY_EXPORT(f16_to_f32);
HWY_EXPORT(f32_to_bf16);
HWY_EXPORT(f32_to_f16);
HWY_EXPORT(activations);

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

TEST(Simd, EveryHalfBecomesItsFloat) {
  std::vector<uint16_t> bits(65536);
  for (size_t i = 0; i < bits.size(); ++i) bits[i] = static_cast<uint16_t>(i);
  for_each_target([&] {
    std::vector<float> got(bits.size());
    const auto expect_exact = [&](DType dtype, const char* name) {
      std::vector<float> want(bits.size());
      for (size_t i = 0; i < bits.size(); ++i) {
        want[i] = kernels::reference::load_element<float>(bits.data(), dtype, i);
      }
      expect_close(got, want, 0, name);
    };
    HWY_DYNAMIC_DISPATCH(bf16_to_f32)(bits.data(), got.data(), got.size());
    expect_exact(DType::bf16, "bf16");
    HWY_DYNAMIC_DISPATCH(f16_to_f32)(bits.data(), got.data(), got.size());
    expect_exact(DType::f16, "f16");
  });
}

TEST(Simd, StoresRoundToNearestEven) {
  std::vector<float> x = {0.0F,     -0.0F,    kInfinity, -kInfinity, kNaN,    -kNaN,    65504.0F,
                          65519.9F, 65520.0F, 65536.0F,  1e30F,      3.4e38F, -65520.0F};
  for (uint32_t i = 0; i < 65536; ++i) {  // every half, the midpoint above it and its neighbours
    for (const uint32_t low : {0x0000U, 0x7FFFU, 0x8000U, 0x8001U}) {
      const uint32_t word = (i << 16) | low;
      float value;
      std::memcpy(&value, &word, sizeof(value));
      x.push_back(value);
    }
    const auto half = static_cast<uint16_t>(i);
    const auto next = static_cast<uint16_t>(i + 1);
    const float a = kernels::reference::load_element<float>(&half, DType::f16, 0);
    const float b = kernels::reference::load_element<float>(&next, DType::f16, 0);
    const float middle = (a + b) / 2;
    x.insert(x.end(), {middle, std::nextafter(middle, a), std::nextafter(middle, b)});
  }
  for_each_target([&] {
    const auto expect_same = [&](const std::vector<uint16_t>& got, DType dtype, const char* name) {
      for (size_t i = 0; i < x.size(); ++i) {
        uint16_t want = 0;
        kernels::reference::store_element<double>(&want, dtype, 0, x[i]);
        if (std::isnan(x[i])) {
          const float back = kernels::reference::load_element<float>(&got[i], dtype, 0);
          ASSERT_TRUE(std::isnan(back)) << name << " of NaN gave " << back;
        } else {
          ASSERT_EQ(got[i], want) << name << " of " << x[i];
        }
      }
    };
    std::vector<uint16_t> got(x.size());
    HWY_DYNAMIC_DISPATCH(f32_to_bf16)(x.data(), got.data(), got.size());
    expect_same(got, DType::bf16, "bf16");
    HWY_DYNAMIC_DISPATCH(f32_to_f16)(x.data(), got.data(), got.size());
    expect_same(got, DType::f16, "f16");
  });
}

TEST(Simd, RemaindersTouchNothingBehindThem) {
  for_each_target([] {
    for (int64_t n = 0; n <= 40; ++n) {
      std::vector<float> x(n);  // exactly n, so that ASan sees a read behind them
      std::vector<uint16_t> y(n + 32, 0xABCD);
      std::vector<float> back(n + 32, 7.0F);
      for (int64_t i = 0; i < n; ++i) x[i] = static_cast<float>(i);
      HWY_DYNAMIC_DISPATCH(f32_to_f16)(x.data(), y.data(), n);
      const std::vector<uint16_t> exact(y.begin(), y.begin() + n);
      HWY_DYNAMIC_DISPATCH(f16_to_f32)(exact.data(), back.data(), n);
      for (int64_t i = 0; i < n; ++i) ASSERT_EQ(back[i], x[i]) << "n " << n;
      for (int64_t i = n; i < n + 32; ++i) {
        ASSERT_EQ(y[i], 0xABCD) << "n " << n << ", i " << i;
        ASSERT_EQ(back[i], 7.0F) << "n " << n << ", i " << i;
      }
    }
  });
}

TEST(Simd, ActivationsMatchDoublePrecision) {
  std::vector<float> x = {0.0F, -0.0F, kInfinity, -1e30F, 1e30F,
                          kNaN, 88.7F, 104.0F,    105.0F, 200.0F};
  for (float value = -110; value < 110; value += 0.0137F) x.push_back(value);
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  for (int i = 0; i < 4096; ++i) x.push_back(normal(random));
  const size_t n = x.size();
  std::vector<std::vector<double>> want(5, std::vector<double>(n));
  for (size_t i = 0; i < n; ++i) {
    const double v = x[i];
    const double sigmoid = 1 / (1 + std::exp(-v));
    want[0][i] = static_cast<float>(std::exp(v));
    want[1][i] = sigmoid;
    want[2][i] = v * sigmoid;
    want[3][i] = std::isinf(v) ? kNaN : sigmoid * (1 + v * (1 - sigmoid));
    want[4][i] = std::isnan(v) ? v : std::fmax(v, 0) + std::log1p(std::exp(-std::fabs(v)));
  }
  for_each_target([&] {
    std::vector<std::vector<float>> got(5, std::vector<float>(n));
    float* const y[] = {got[0].data(), got[1].data(), got[2].data(), got[3].data(), got[4].data()};
    HWY_DYNAMIC_DISPATCH(activations)(x.data(), y, static_cast<int64_t>(n));
    // SafeExp is good to 1 ulp (2^-23), hn::Log1p to 2; each further operation adds half an ulp.
    // Below the smallest normal number only the absolute error is bounded. The derivative of silu
    // holds x * (1 - sigmoid): half an ulp of 1, times x, up to 17, where the sigmoid rounds to 1.
    const double ulp = std::ldexp(1.0, -23);
    const double tiny = std::numeric_limits<float>::min() * 100;
    expect_close(got[0], want[0], {tiny, 1 * ulp}, "exp");
    expect_close(got[1], want[1], {tiny, 2.5 * ulp}, "sigmoid");
    expect_close(got[2], want[2], {tiny, 3 * ulp}, "silu");
    expect_close(got[3], want[3], {17 * ulp / 2, 4 * ulp}, "silu gradient");
    expect_close(got[4], want[4], {tiny, 4 * ulp}, "softplus");
  });
}

}  // namespace
}  // namespace gdn::test
#endif  // HWY_ONCE
