#include <cmath>
#include <limits>

#include <gdn/kernels/cpu/cross_entropy.h>
#include <gdn/kernels/cpu/element_type.h>
#include <gdn/kernels/cpu/rows.h>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "gdn/kernels/cpu/cross_entropy.cpp"
#include <hwy/foreach_target.h>  // IWYU pragma: keep

#include <gdn/kernels/cpu/simd-inl.h>

HWY_BEFORE_NAMESPACE();
namespace gdn::kernels::cpu::HWY_NAMESPACE {

using F32 = hn::ScalableTag<float>;

template <typename T>
float load_one(const T* p) {
  const hn::CappedTag<float, 1> d1;
  return hn::GetLane(LoadF32(d1, p));
}

/// log(sum_j exp(x_j)); NaN when an element is.
template <typename T>
float log_sum_exp(const T* x, int64_t n) {
  const F32 d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  const auto infinity = hn::Set(d, std::numeric_limits<float>::infinity());
  // Lanes behind the end count as -infinity: as nothing.
  const auto load = [&](int64_t i) HWY_ATTR {
    const int64_t rest = n - i;
    const auto v = LoadF32(d, x + i, rest);
    if (HWY_LIKELY(rest >= lanes)) return v;
    return hn::IfThenElse(hn::FirstN(d, static_cast<size_t>(rest)), v, hn::Neg(infinity));
  };
  auto largest = hn::Neg(infinity);
  for (int64_t i = 0; i < n; i += lanes) largest = hn::Max(load(i), largest);
  const float max = hn::GetLane(hn::MaxOfLanes(d, largest));
  auto sum = hn::Zero(d);
  for (int64_t i = 0; i < n; i += lanes) {
    sum = hn::Add(sum, SafeExp(d, hn::Sub(load(i), hn::Set(d, max))));
  }
  return max + std::log(hn::GetLane(hn::SumOfLanes(d, sum)));
}

template <typename T>
void cross_entropy_rows(const CrossEntropyForward& p, int64_t begin, int64_t end) {
  auto* loss = static_cast<float*>(p.loss);
  auto* total = static_cast<float*>(p.log_sum_exp);
  for (int64_t m = begin; m < end; ++m) {
    loss[m] = total[m] = 0.0F;
    if (p.target[m] == p.ignore_index) continue;
    const T* x = static_cast<const T*>(p.logits.data) + m * p.logits.stride;
    total[m] = log_sum_exp(x, p.vocabulary);
    loss[m] = total[m] - load_one(x + p.target[m]);
  }
}

template <typename T>
void cross_entropy_backward_rows(const CrossEntropyBackward& p, int64_t begin, int64_t end) {
  const F32 d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  for (int64_t m = begin; m < end; ++m) {
    const T* x = static_cast<const T*>(p.logits.data) + m * p.logits.stride;
    T* d_x = static_cast<T*>(p.d_logits.data) + m * p.d_logits.stride;
    if (p.target[m] == p.ignore_index) {
      for (int64_t i = 0; i < p.vocabulary; i += lanes) {
        StoreF32(d, hn::Zero(d), d_x + i, p.vocabulary - i);
      }
      continue;
    }
    const float d_loss = static_cast<const float*>(p.d_loss)[m];
    const float total = static_cast<const float*>(p.log_sum_exp)[m];
    const float target_logit = load_one(x + p.target[m]);  // before d_x, which may be x
    for (int64_t i = 0; i < p.vocabulary; i += lanes) {
      const int64_t rest = p.vocabulary - i;
      const auto v = hn::Sub(LoadF32(d, x + i, rest), hn::Set(d, total));
      StoreF32(d, hn::Mul(hn::Set(d, d_loss), SafeExp(d, v)), d_x + i, rest);
    }
    const hn::CappedTag<float, 1> d1;
    const float d_target = d_loss * std::expm1(target_logit - total);
    StoreF32(d1, hn::Set(d1, d_target), d_x + p.target[m]);
  }
}

void cross_entropy_range(const CrossEntropyForward& p, int64_t begin, int64_t end) {
  with_element_type(p.dtype, [&]<typename T>(T*) { cross_entropy_rows<T>(p, begin, end); });
}

void cross_entropy_backward_range(const CrossEntropyBackward& p, int64_t begin, int64_t end) {
  with_element_type(p.dtype,
                    [&]<typename T>(T*) { cross_entropy_backward_rows<T>(p, begin, end); });
}

}  // namespace gdn::kernels::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace gdn::kernels::cpu {

HWY_EXPORT(cross_entropy_range);
HWY_EXPORT(cross_entropy_backward_range);

void cross_entropy(const CrossEntropyForward& p) {
  for_rows(p.parallel_for, p.M, p.vocabulary, [&](int64_t begin, int64_t end) {
    HWY_DYNAMIC_DISPATCH(cross_entropy_range)(p, begin, end);
  });
}

void cross_entropy_backward(const CrossEntropyBackward& p) {
  for_rows(p.parallel_for, p.M, p.vocabulary, [&](int64_t begin, int64_t end) {
    HWY_DYNAMIC_DISPATCH(cross_entropy_backward_range)(p, begin, end);
  });
}

}  // namespace gdn::kernels::cpu
#endif  // HWY_ONCE
