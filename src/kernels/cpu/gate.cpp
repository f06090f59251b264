#include <cmath>
#include <vector>

#include <gdn/kernels/cpu/element_type.h>
#include <gdn/kernels/cpu/gate.h>
#include <gdn/kernels/cpu/rows.h>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "gdn/kernels/cpu/gate.cpp"
#include <hwy/foreach_target.h>  // IWYU pragma: keep

#include <gdn/kernels/cpu/simd-inl.h>

HWY_BEFORE_NAMESPACE();
namespace gdn::kernels::cpu::HWY_NAMESPACE {

using F32 = hn::ScalableTag<float>;

/// Groups begin to end - 1, each of `width` consecutive elements of [M, HV], for which minus_rate
/// and dt_bias hold the parameters.
void gate_groups(const GateForward& p, const float* minus_rate, const float* dt_bias, int64_t width,
                 int64_t begin, int64_t end) {
  const F32 d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  with_element_type(p.dtype, [&]<typename T>(T*) HWY_ATTR {
    for (int64_t group = begin; group < end; ++group) {
      const int64_t first = group * width;
      const int64_t n = std::min(width, p.M * p.HV - first);
      const auto* a = static_cast<const T*>(p.a) + first;
      float* g = static_cast<float*>(p.g) + first;
      for (int64_t i = 0; i < n; i += lanes) {
        const int64_t rest = n - i;
        const auto x = hn::Add(LoadF32(d, a + i, rest), LoadF32(d, dt_bias + i, rest));
        StoreF32(d, hn::Mul(LoadF32(d, minus_rate + i, rest), Softplus(d, x)), g + i, rest);
      }
    }
  });
}

/// Adds to the partial sums d_A_log [width] and d_dt_bias [width].
void gate_backward_groups(const GateBackward& p, const float* minus_rate, const float* dt_bias,
                          int64_t width, int64_t begin, int64_t end, float* d_A_log,
                          float* d_dt_bias) {
  const F32 d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  with_element_type(p.dtype, [&]<typename T>(T*) HWY_ATTR {
    for (int64_t group = begin; group < end; ++group) {
      const int64_t first = group * width;
      const int64_t n = std::min(width, p.M * p.HV - first);
      const auto* a = static_cast<const T*>(p.a) + first;
      const float* d_g = static_cast<const float*>(p.d_g) + first;
      auto* d_a = static_cast<T*>(p.d_a) + first;
      for (int64_t i = 0; i < n; i += lanes) {
        const int64_t rest = n - i;
        const auto x = hn::Add(LoadF32(d, a + i, rest), LoadF32(d, dt_bias + i, rest));
        const auto scaled = hn::Mul(LoadF32(d, d_g + i, rest), LoadF32(d, minus_rate + i, rest));
        const auto d_x = hn::Mul(scaled, Sigmoid(d, x));
        StoreF32(d, d_x, d_a + i, rest);
        StoreF32(d, hn::Add(LoadF32(d, d_dt_bias + i, rest), d_x), d_dt_bias + i, rest);
        const auto sum = hn::MulAdd(scaled, Softplus(d, x), LoadF32(d, d_A_log + i, rest));
        StoreF32(d, sum, d_A_log + i, rest);
      }
    }
  });
}

}  // namespace gdn::kernels::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace gdn::kernels::cpu {
namespace {

HWY_EXPORT(gate_groups);
HWY_EXPORT(gate_backward_groups);

/// The parameters, repeated for a group of so many tokens that even few heads fill vectors.
struct TokenGroups {
  int64_t width;  // elements of a group, a multiple of HV
  int64_t count;
  std::vector<float> minus_rate, dt_bias;  // [width]

  explicit TokenGroups(const GateProblem& p)
      : width(std::max<int64_t>(1, 256 / p.HV) * p.HV),
        count((p.M * p.HV + width - 1) / width),
        minus_rate(width),
        dt_bias(width) {
    for (int64_t i = 0; i < width; ++i) {
      minus_rate[i] = -std::exp(static_cast<const float*>(p.A_log)[i % p.HV]);
      dt_bias[i] = static_cast<const float*>(p.dt_bias)[i % p.HV];
    }
  }
};

}  // namespace

void gate(const GateForward& p) {
  if (p.HV == 0) return;
  const TokenGroups groups(p);
  for_rows(p.parallel_for, groups.count, groups.width, [&](int64_t begin, int64_t end) {
    HWY_DYNAMIC_DISPATCH(gate_groups)
    (p, groups.minus_rate.data(), groups.dt_bias.data(), groups.width, begin, end);
  });
}

void gate_backward(const GateBackward& p) {
  if (p.HV == 0) return;
  const TokenGroups groups(p);
  const int64_t width = groups.width;
  std::vector<float> total(2 * width);  // d_A_log, then d_dt_bias
  sum_over_rows(p.parallel_for, groups.count, width, 2 * width, total.data(),
                [&](int64_t begin, int64_t end, float* partial) {
                  HWY_DYNAMIC_DISPATCH(gate_backward_groups)
                  (p, groups.minus_rate.data(), groups.dt_bias.data(), width, begin, end, partial,
                   partial + width);
                });
  auto* d_A_log = static_cast<float*>(p.d_A_log);
  auto* d_dt_bias = static_cast<float*>(p.d_dt_bias);
  std::fill_n(d_A_log, p.HV, 0.0F);
  std::fill_n(d_dt_bias, p.HV, 0.0F);
  for (int64_t i = 0; i < width; ++i) {
    d_A_log[i % p.HV] += total[i];
    d_dt_bias[i % p.HV] += total[width + i];
  }
}

}  // namespace gdn::kernels::cpu
#endif  // HWY_ONCE
