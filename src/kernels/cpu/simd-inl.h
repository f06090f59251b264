// Vectors of fp32 from and to memory of fp32, bf16 or fp16, and from int8, and activation functions
// on them.
//
// It extends Highway's vocabulary, so the names follow Highway's. Include it, as every -inl header,
// after foreach_target.h.

#if defined(GDN_KERNELS_CPU_SIMD_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef GDN_KERNELS_CPU_SIMD_INL_H_
#undef GDN_KERNELS_CPU_SIMD_INL_H_
#else
#define GDN_KERNELS_CPU_SIMD_INL_H_
#endif

#include <cstdint>
#include <cstring>
#include <limits>

#include <hwy/contrib/math/math-inl.h>
#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace gdn::kernels::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// Highway 1.0.3 converts fp16 in software where F16C is missing, and then neither rounds to nearest
// nor knows infinity and NaN.
#if HWY_TARGET == HWY_SSSE3 || HWY_TARGET == HWY_SSE4 || HWY_TARGET == HWY_EMU128 || \
    HWY_TARGET == HWY_SCALAR
inline constexpr bool kSoftwareF16 = true;
#else
inline constexpr bool kSoftwareF16 = false;
#endif

template <class D>
HWY_INLINE hn::Vec<D> PromoteF16(D d, hn::Vec<hn::Rebind<hwy::float16_t, D>> half) {
  const hn::Vec<D> v = hn::PromoteTo(d, half);
  if constexpr (!kSoftwareF16) return v;
  // The exponent 31 of infinity and NaN came out as 143, which no finite fp16 has.
  const hn::RebindToUnsigned<D> du;
  const auto exponent = hn::Set(du, 0x7F800000U);
  const auto bits = hn::BitCast(du, v);
  const auto special = hn::Eq(hn::And(bits, exponent), hn::Set(du, 143U << 23));
  return hn::BitCast(d, hn::IfThenElse(special, hn::Or(bits, exponent), bits));
}

template <class D>
HWY_INLINE hn::Vec<hn::Rebind<hwy::float16_t, D>> DemoteF16(D d, hn::Vec<D> v) {
  const hn::Rebind<hwy::float16_t, D> d16;
  if constexpr (!kSoftwareF16) return hn::DemoteTo(d16, v);
  const hn::RebindToUnsigned<D> du;
  const hn::RebindToSigned<D> di;
  const hn::Rebind<uint16_t, D> du16;
  const auto signed_bits = hn::BitCast(du, v);
  const auto bits = hn::And(signed_bits, hn::Set(du, 0x7FFFFFFFU));
  const auto sign = hn::ShiftRight<16>(hn::Xor(signed_bits, bits));
  const auto below = [&](uint32_t limit) HWY_ATTR {  // bits < limit; both are positive as int32
    return hn::RebindMask(du,
                          hn::Lt(hn::BitCast(di, bits), hn::Set(di, static_cast<int32_t>(limit))));
  };
  // Normal: rebias the exponent from 127 to 15, round the 13 lost bits to nearest even.
  const auto odd = hn::And(hn::ShiftRight<13>(bits), hn::Set(du, 1U));
  const auto rebias = hn::Set(du, 0xFFFU - (112U << 23));
  const auto normal = hn::ShiftRight<13>(hn::Add(bits, hn::Add(rebias, odd)));
  // Subnormal: adding 0.5 aligns the value so that the hardware rounds it to a multiple of 2^-24.
  const auto half = hn::Set(d, 0.5F);
  const auto subnormal =
      hn::Sub(hn::BitCast(du, hn::Add(hn::BitCast(d, bits), half)), hn::BitCast(du, half));
  const auto special =
      hn::IfThenElse(below(0x7F800001U), hn::Set(du, 0x7C00U), hn::Set(du, 0x7E00U));
  const auto finite = hn::IfThenElse(below(113U << 23), subnormal, normal);
  const auto magnitude = hn::IfThenElse(below(143U << 23), finite, special);
  return hn::BitCast(d16, hn::DemoteTo(du16, hn::BitCast(di, hn::Or(sign, magnitude))));
}

/// Rounds to nearest even, where Highway's own conversion truncates; NaN stays NaN.
template <class D>
HWY_INLINE hn::Vec<hn::Rebind<hwy::bfloat16_t, D>> DemoteBF16(D d, hn::Vec<D> v) {
  const hn::RebindToUnsigned<D> du;
  const auto bits = hn::BitCast(du, v);
  const auto odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(du, 1U));
  const auto rounded = hn::Add(bits, hn::Add(odd, hn::Set(du, 0x7FFFU)));
  const auto quiet = hn::Or(bits, hn::Set(du, 0x00400000U));
  const auto nan = hn::RebindMask(du, hn::IsNaN(v));
  return hn::DemoteTo(hn::Rebind<hwy::bfloat16_t, D>(),
                      hn::BitCast(d, hn::IfThenElse(nan, quiet, rounded)));
}

/// The next Lanes(d) elements at p, as fp32. No alignment is needed.
template <class D>
HWY_INLINE hn::Vec<D> LoadF32(D d, const float* p) {
  return hn::LoadU(d, p);
}
template <class D>
HWY_INLINE hn::Vec<D> LoadF32(D d, const hwy::bfloat16_t* p) {
  return hn::PromoteTo(d, hn::LoadU(hn::Rebind<hwy::bfloat16_t, D>(), p));
}
template <class D>
HWY_INLINE hn::Vec<D> LoadF32(D d, const hwy::float16_t* p) {
  return PromoteF16(d, hn::LoadU(hn::Rebind<hwy::float16_t, D>(), p));
}
template <class D>
HWY_INLINE hn::Vec<D> LoadF32(D d, const int8_t* p) {
  const auto whole = hn::PromoteTo(hn::RebindToSigned<D>(), hn::LoadU(hn::Rebind<int8_t, D>(), p));
  return hn::ConvertTo(d, whole);
}

/// Writes v to the next Lanes(d) elements at p, rounded to nearest even.
template <class D>
HWY_INLINE void StoreF32(D d, hn::Vec<D> v, float* p) {
  hn::StoreU(v, d, p);
}
template <class D>
HWY_INLINE void StoreF32(D d, hn::Vec<D> v, hwy::bfloat16_t* p) {
  hn::StoreU(DemoteBF16(d, v), hn::Rebind<hwy::bfloat16_t, D>(), p);
}
template <class D>
HWY_INLINE void StoreF32(D d, hn::Vec<D> v, hwy::float16_t* p) {
  hn::StoreU(DemoteF16(d, v), hn::Rebind<hwy::float16_t, D>(), p);
}

/// The first min(n, Lanes(d)) elements at p and zeros after them; nothing behind them is read.
template <class D, typename T>
HWY_INLINE hn::Vec<D> LoadF32(D d, const T* p, int64_t n) {
  if (HWY_LIKELY(n >= static_cast<int64_t>(hn::Lanes(d)))) return LoadF32(d, p);
  T lanes[hn::MaxLanes(d)] = {};  // Highway's masked loads of 16-bit lanes may read behind p + n
  std::memcpy(lanes, p, static_cast<size_t>(n) * sizeof(T));
  return LoadF32(d, lanes);
}

/// Writes the first min(n, Lanes(d)) lanes of v to p, and nothing behind them.
template <class D, typename T>
HWY_INLINE void StoreF32(D d, hn::Vec<D> v, T* p, int64_t n) {
  if (HWY_LIKELY(n >= static_cast<int64_t>(hn::Lanes(d)))) return StoreF32(d, v, p);
  T lanes[hn::MaxLanes(d)];
  StoreF32(d, v, lanes);
  std::memcpy(p, lanes, static_cast<size_t>(n) * sizeof(T));
}

/// The n elements at `from` in the element type of `to`.
template <typename From, typename To>
void ConvertElements(const From* from, To* to, int64_t n) {
  const hn::ScalableTag<float> d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  for (int64_t i = 0; i < n; i += lanes) {
    StoreF32(d, LoadF32(d, from + i, n - i), to + i, n - i);
  }
}

/// exp(x) within 1 ulp, but 0 below the smallest normal number: half the instructions of hn::Exp,
/// which is made for x below 104 and turns NaN into 0.
template <class D, class V = hn::Vec<D>>
HWY_INLINE V SafeExp(D d, V x) {
  const hn::RebindToSigned<D> di;
  // n = round(x / ln 2), in the lowest bits of a sum whose fraction is rounded away.
  const V magic = hn::Set(d, 0x1.8p23F);
  const V shifted = hn::MulAdd(x, hn::Set(d, 1.44269504F), magic);
  const V n = hn::Sub(shifted, magic);
  // r = x - n ln 2, in two steps; e^r by the polynomial of least relative error, 3e-9.
  V r = hn::MulAdd(n, hn::Set(d, -0.693145751953125F), x);
  r = hn::MulAdd(n, hn::Set(d, -1.42860677e-6F), r);
  const V r2 = hn::Mul(r, r);
  const V low = hn::MulAdd(r, hn::Set(d, 0.166665204F), hn::Set(d, 0.4999999343F));
  const V high = hn::MulAdd(r, hn::Set(d, 0.008368745196F), hn::Set(d, 0.04166839079F));
  const V all = hn::MulAdd(hn::MulAdd(r2, hn::Set(d, 0.001381454011F), high), r2, low);
  const V power = hn::Add(hn::MulAdd(all, r2, r), hn::Set(d, 1.0F));
  // times 2^n
  const V y =
      hn::BitCast(d, hn::Add(hn::BitCast(di, power), hn::ShiftLeft<23>(hn::BitCast(di, shifted))));
  const V positive = hn::IfThenZeroElse(hn::Lt(x, hn::Set(d, -87.33654F)), y);
  // Beyond the largest number the product is infinite; NaN is not below the limit, and stays.
  const V beyond = hn::Mul(x, hn::Set(d, std::numeric_limits<float>::max()));
  return hn::IfThenElse(hn::Le(x, hn::Set(d, 88.72283F)), positive, beyond);
}

/// 1 / (1 + exp(-x)).
template <class D, class V = hn::Vec<D>>
HWY_INLINE V Sigmoid(D d, V x) {
  const V one = hn::Set(d, 1.0F);
  return hn::Div(one, hn::Add(one, SafeExp(d, hn::Neg(x))));
}

/// x * sigmoid(x).
template <class D, class V = hn::Vec<D>>
HWY_INLINE V Silu(D d, V x) {
  return hn::Mul(x, Sigmoid(d, x));
}

/// d silu(x) / dx, given sigmoid(x).
template <class D, class V = hn::Vec<D>>
HWY_INLINE V SiluGradient(D d, V x, V sigmoid) {
  const V one = hn::Set(d, 1.0F);
  return hn::Mul(sigmoid, hn::MulAdd(x, hn::Sub(one, sigmoid), one));
}

/// log(1 + exp(x)).
template <class D, class V = hn::Vec<D>>
HWY_INLINE V Softplus(D d, V x) {
  const V tail = hn::Log1p(d, SafeExp(d, hn::Neg(hn::Abs(x))));
  return hn::IfThenElse(hn::IsNaN(x), x, hn::Add(hn::Max(x, hn::Zero(d)), tail));
}

}  // namespace gdn::kernels::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // include guard
