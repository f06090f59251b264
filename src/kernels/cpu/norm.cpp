#include <cmath>
#include <vector>

#include <gdn/kernels/cpu/element_type.h>
#include <gdn/kernels/cpu/norm.h>
#include <gdn/kernels/cpu/rows.h>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "gdn/kernels/cpu/norm.cpp"
#include <hwy/foreach_target.h>  // IWYU pragma: keep

#include <gdn/kernels/cpu/simd-inl.h>

HWY_BEFORE_NAMESPACE();
namespace gdn::kernels::cpu::HWY_NAMESPACE {

using F32 = hn::ScalableTag<float>;

/// r, the factor of a row with this sum of squares.
inline float row_factor(const NormProblem& p, float sum_of_squares) {
  const float mean =
      p.kind == NormKind::rms ? sum_of_squares / static_cast<float>(p.D) : sum_of_squares;
  return 1.0F / std::sqrt(mean + static_cast<float>(p.eps));
}

template <typename T, bool kGated>
void norm_rows(const NormForward& p, const float* weight, int64_t begin, int64_t end) {
  const F32 d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  for (int64_t m = begin; m < end; ++m) {
    const T* x = static_cast<const T*>(p.x.data) + m * p.x.stride;
    T* y = static_cast<T*>(p.y.data) + m * p.y.stride;
    if (p.residual.data != nullptr) {
      const T* residual = static_cast<const T*>(p.residual.data) + m * p.residual.stride;
      T* sum = static_cast<T*>(p.sum.data) + m * p.sum.stride;
      for (int64_t i = 0; i < p.D; i += lanes) {
        const int64_t rest = p.D - i;
        const auto added = hn::Add(LoadF32(d, x + i, rest), LoadF32(d, residual + i, rest));
        StoreF32(d, added, sum + i, rest);
      }
      x = sum;
    }
    auto squares = hn::Zero(d);
    for (int64_t i = 0; i < p.D; i += lanes) {
      const auto v = LoadF32(d, x + i, p.D - i);
      squares = hn::MulAdd(v, v, squares);
    }
    const auto r = hn::Set(d, row_factor(p, hn::GetLane(hn::SumOfLanes(d, squares))));
    for (int64_t i = 0; i < p.D; i += lanes) {
      auto v = hn::Mul(hn::Mul(LoadF32(d, x + i, p.D - i), r), LoadF32(d, weight + i, p.D - i));
      if constexpr (kGated) {
        const T* gate = static_cast<const T*>(p.gate.data) + m * p.gate.stride;
        v = hn::Mul(v, Silu(d, LoadF32(d, gate + i, p.D - i)));
      }
      StoreF32(d, v, y + i, p.D - i);
    }
  }
}

/// Adds to the partial sums d_weight [D].
template <typename T, bool kGated>
void norm_backward_rows(const NormBackward& p, const float* weight, int64_t begin, int64_t end,
                        float* d_weight) {
  const F32 d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  // With a gate: d_y * silu(gate), and d_gate without its factor r, which the first pass only
  // finds.
  std::vector<float> d_normed(kGated ? p.D : 0);
  std::vector<float> d_gate_over_r(kGated ? p.D : 0);
  for (int64_t m = begin; m < end; ++m) {
    const T* x = static_cast<const T*>(p.x.data) + m * p.x.stride;
    const T* d_y = static_cast<const T*>(p.d_y.data) + m * p.d_y.stride;
    T* d_x = static_cast<T*>(p.d_x.data) + m * p.d_x.stride;
    auto squares = hn::Zero(d);
    auto products = hn::Zero(d);
    for (int64_t i = 0; i < p.D; i += lanes) {
      const int64_t rest = p.D - i;
      const auto v = LoadF32(d, x + i, rest);
      const auto w = LoadF32(d, weight + i, rest);
      auto e = LoadF32(d, d_y + i, rest);
      if constexpr (kGated) {
        const T* gate = static_cast<const T*>(p.gate.data) + m * p.gate.stride;
        const auto z = LoadF32(d, gate + i, rest);
        const auto sigmoid = Sigmoid(d, z);
        const auto d_silu = hn::Mul(hn::Mul(e, w), v);
        StoreF32(d, hn::Mul(d_silu, SiluGradient(d, z, sigmoid)), d_gate_over_r.data() + i, rest);
        e = hn::Mul(e, hn::Mul(z, sigmoid));
        StoreF32(d, e, d_normed.data() + i, rest);
      }
      squares = hn::MulAdd(v, v, squares);
      products = hn::MulAdd(hn::Mul(e, w), v, products);
    }
    const float factor = row_factor(p, hn::GetLane(hn::SumOfLanes(d, squares)));
    float c = hn::GetLane(hn::SumOfLanes(d, products)) * factor;
    if (p.kind == NormKind::rms) c /= static_cast<float>(p.D);
    const auto r = hn::Set(d, factor);
    const auto minus_c = hn::Set(d, -c);
    for (int64_t i = 0; i < p.D; i += lanes) {
      const int64_t rest = p.D - i;
      auto e = hn::Zero(d);
      if constexpr (kGated) {
        T* d_gate = static_cast<T*>(p.d_gate.data) + m * p.d_gate.stride;
        StoreF32(d, hn::Mul(r, LoadF32(d, d_gate_over_r.data() + i, rest)), d_gate + i, rest);
        e = LoadF32(d, d_normed.data() + i, rest);
      } else {
        e = LoadF32(d, d_y + i, rest);
      }
      const auto normed = hn::Mul(LoadF32(d, x + i, rest), r);
      const auto h = hn::Mul(e, LoadF32(d, weight + i, rest));
      auto gradient = hn::Mul(r, hn::MulAdd(normed, minus_c, h));
      if (p.d_sum.data != nullptr) {
        const T* d_sum = static_cast<const T*>(p.d_sum.data) + m * p.d_sum.stride;
        gradient = hn::Add(gradient, LoadF32(d, d_sum + i, rest));
      }
      StoreF32(d, gradient, d_x + i, rest);
      const auto sum = hn::MulAdd(e, normed, LoadF32(d, d_weight + i, rest));
      StoreF32(d, sum, d_weight + i, rest);
    }
  }
}

/// The weights as fp32; ones when there are none.
void load_weight(const NormProblem& p, float* weight) {
  if (p.weight == nullptr) {
    std::fill_n(weight, p.D, 1.0F);
    return;
  }
  with_element_type(p.weight_dtype, [&]<typename T>(T*) {
    ConvertElements(static_cast<const T*>(p.weight), weight, p.D);
  });
}

void norm_range(const NormForward& p, const float* weight, int64_t begin, int64_t end) {
  with_element_type(p.dtype, [&]<typename T>(T*) {
    if (p.gate.data == nullptr) return norm_rows<T, false>(p, weight, begin, end);
    norm_rows<T, true>(p, weight, begin, end);
  });
}

void norm_backward_range(const NormBackward& p, const float* weight, int64_t begin, int64_t end,
                         float* d_weight) {
  with_element_type(p.dtype, [&]<typename T>(T*) {
    if (p.gate.data == nullptr)
      return norm_backward_rows<T, false>(p, weight, begin, end, d_weight);
    norm_backward_rows<T, true>(p, weight, begin, end, d_weight);
  });
}

}  // namespace gdn::kernels::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace gdn::kernels::cpu {

HWY_EXPORT(load_weight);
HWY_EXPORT(norm_range);
HWY_EXPORT(norm_backward_range);

void norm(const NormForward& p) {
  std::vector<float> weight(p.D);
  HWY_DYNAMIC_DISPATCH(load_weight)(p, weight.data());
  for_rows(p.parallel_for, p.M, p.D, [&](int64_t begin, int64_t end) {
    HWY_DYNAMIC_DISPATCH(norm_range)(p, weight.data(), begin, end);
  });
}

void norm_backward(const NormBackward& p) {
  std::vector<float> weight(p.D);
  HWY_DYNAMIC_DISPATCH(load_weight)(p, weight.data());
  std::vector<float> unwanted(p.d_weight == nullptr ? p.D : 0);
  float* d_weight = p.d_weight == nullptr ? unwanted.data() : static_cast<float*>(p.d_weight);
  sum_over_rows(p.parallel_for, p.M, p.D, p.D, d_weight,
                [&](int64_t begin, int64_t end, float* partial) {
                  HWY_DYNAMIC_DISPATCH(norm_backward_range)(p, weight.data(), begin, end, partial);
                });
}

}  // namespace gdn::kernels::cpu
#endif  // HWY_ONCE
