#include <gdn/kernels/cpu/element_type.h>
#include <gdn/kernels/cpu/rows.h>
#include <gdn/kernels/cpu/swiglu.h>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "gdn/kernels/cpu/swiglu.cpp"
#include <hwy/foreach_target.h>  // IWYU pragma: keep

#include <gdn/kernels/cpu/simd-inl.h>

HWY_BEFORE_NAMESPACE();
namespace gdn::kernels::cpu::HWY_NAMESPACE {

using F32 = hn::ScalableTag<float>;

template <typename T>
void swiglu_rows(const SwigluForward& p, int64_t begin, int64_t end) {
  const F32 d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  for (int64_t m = begin; m < end; ++m) {
    const T* gate = static_cast<const T*>(p.gate.data) + m * p.gate.stride;
    const T* up = static_cast<const T*>(p.up.data) + m * p.up.stride;
    T* y = static_cast<T*>(p.y.data) + m * p.y.stride;
    for (int64_t i = 0; i < p.D; i += lanes) {
      const int64_t rest = p.D - i;
      const auto activated = Silu(d, LoadF32(d, gate + i, rest));
      StoreF32(d, hn::Mul(activated, LoadF32(d, up + i, rest)), y + i, rest);
    }
  }
}

template <typename T>
void swiglu_backward_rows(const SwigluBackward& p, int64_t begin, int64_t end) {
  const F32 d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  for (int64_t m = begin; m < end; ++m) {
    const T* gate = static_cast<const T*>(p.gate.data) + m * p.gate.stride;
    const T* up = static_cast<const T*>(p.up.data) + m * p.up.stride;
    const T* d_y = static_cast<const T*>(p.d_y.data) + m * p.d_y.stride;
    T* d_gate = static_cast<T*>(p.d_gate.data) + m * p.d_gate.stride;
    T* d_up = static_cast<T*>(p.d_up.data) + m * p.d_up.stride;
    for (int64_t i = 0; i < p.D; i += lanes) {
      const int64_t rest = p.D - i;
      const auto z = LoadF32(d, gate + i, rest);
      const auto u = LoadF32(d, up + i, rest);
      const auto e = LoadF32(d, d_y + i, rest);
      const auto sigmoid = Sigmoid(d, z);
      StoreF32(d, hn::Mul(e, hn::Mul(z, sigmoid)), d_up + i, rest);
      StoreF32(d, hn::Mul(hn::Mul(e, u), SiluGradient(d, z, sigmoid)), d_gate + i, rest);
    }
  }
}

void swiglu_range(const SwigluForward& p, int64_t begin, int64_t end) {
  with_element_type(p.dtype, [&]<typename T>(T*) { swiglu_rows<T>(p, begin, end); });
}

void swiglu_backward_range(const SwigluBackward& p, int64_t begin, int64_t end) {
  with_element_type(p.dtype, [&]<typename T>(T*) { swiglu_backward_rows<T>(p, begin, end); });
}

}  // namespace gdn::kernels::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace gdn::kernels::cpu {

HWY_EXPORT(swiglu_range);
HWY_EXPORT(swiglu_backward_range);

void swiglu(const SwigluForward& p) {
  for_rows(p.parallel_for, p.M, p.D, [&](int64_t begin, int64_t end) {
    HWY_DYNAMIC_DISPATCH(swiglu_range)(p, begin, end);
  });
}

void swiglu_backward(const SwigluBackward& p) {
  for_rows(p.parallel_for, p.M, p.D, [&](int64_t begin, int64_t end) {
    HWY_DYNAMIC_DISPATCH(swiglu_backward_range)(p, begin, end);
  });
}

}  // namespace gdn::kernels::cpu
#endif  // HWY_ONCE
