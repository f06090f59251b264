// Elements of any dtype as real numbers, for the plain loops of the reference kernels.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include <gdn/kernels/types.h>

namespace gdn::kernels::reference {

/// Value of a bf16 or fp16 number with the given fields.
inline double decode_float(uint16_t bits, int exponent_bits, int mantissa_bits) {
  const int mantissa = bits & ((1 << mantissa_bits) - 1);
  const int exponent = (bits >> mantissa_bits) & ((1 << exponent_bits) - 1);
  const int bias = (1 << (exponent_bits - 1)) - 1;
  double value;
  if (exponent == (1 << exponent_bits) - 1) {
    value = mantissa == 0 ? std::numeric_limits<double>::infinity()
                          : std::numeric_limits<double>::quiet_NaN();
  } else if (exponent == 0) {
    value = std::ldexp(mantissa, 1 - bias - mantissa_bits);
  } else {
    value = std::ldexp(mantissa + (1 << mantissa_bits), exponent - bias - mantissa_bits);
  }
  return (bits >> 15) != 0 ? -value : value;
}

/// The nearest bf16 or fp16 number, ties to even.
inline uint16_t encode_float(double value, int exponent_bits, int mantissa_bits) {
  const int infinity = ((1 << exponent_bits) - 1) << mantissa_bits;
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  if (std::isnan(value)) return sign | static_cast<uint16_t>(infinity | (1 << (mantissa_bits - 1)));
  if (std::isinf(value)) return sign | static_cast<uint16_t>(infinity);
  int exponent = 0;
  std::frexp(value, &exponent);  // |value| = f * 2^exponent with f in [0.5, 1)
  exponent = value == 0 ? 1 - bias : std::max(exponent - 1, 1 - bias);
  // Counted in units of the last place; a carry out of the mantissa moves into the exponent.
  const auto units =
      static_cast<int64_t>(std::nearbyint(std::ldexp(std::fabs(value), mantissa_bits - exponent)));
  const int64_t bits = units + (static_cast<int64_t>(exponent + bias - 1) << mantissa_bits);
  return sign | static_cast<uint16_t>(std::min<int64_t>(bits, infinity));
}

/// The dtype of statistics, losses and parameter gradients that go with data of `dtype`.
inline DType statistics_dtype(DType dtype) { return dtype == DType::f64 ? DType::f64 : DType::f32; }

/// Element `index` of the array of `dtype` at `data`.
template <typename Real>
Real load_element(const void* data, DType dtype, int64_t index) {
  switch (dtype) {
    case DType::f32:
      return static_cast<Real>(static_cast<const float*>(data)[index]);
    case DType::f64:
      return static_cast<Real>(static_cast<const double*>(data)[index]);
    case DType::bf16:
      return static_cast<Real>(decode_float(static_cast<const uint16_t*>(data)[index], 8, 7));
    case DType::f16:
      return static_cast<Real>(decode_float(static_cast<const uint16_t*>(data)[index], 5, 10));
  }
  return std::numeric_limits<Real>::quiet_NaN();
}

template <typename Real>
void store_element(void* data, DType dtype, int64_t index, Real value) {
  switch (dtype) {
    case DType::f32:
      static_cast<float*>(data)[index] = static_cast<float>(value);
      break;
    case DType::f64:
      static_cast<double*>(data)[index] = static_cast<double>(value);
      break;
    case DType::bf16:
      static_cast<uint16_t*>(data)[index] = encode_float(value, 8, 7);
      break;
    case DType::f16:
      static_cast<uint16_t*>(data)[index] = encode_float(value, 5, 10);
      break;
  }
}

template <typename Real>
Real sigmoid(Real x) {
  return 1 / (1 + std::exp(-x));
}

template <typename Real>
Real silu(Real x) {
  return x * sigmoid(x);
}

template <typename Real>
Real silu_gradient(Real x) {
  const Real s = sigmoid(x);
  return s * (1 + x * (1 - s));
}

template <typename Real>
Real softplus(Real x) {
  return (x > 0 ? x : 0) + std::log1p(std::exp(-std::fabs(x)));
}

}  // namespace gdn::kernels::reference
