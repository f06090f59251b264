// From a DType to the element type that the SIMD kernels are compiled for.
#pragma once

#include <stdexcept>

#include <hwy/base.h>

#include <gdn/kernels/types.h>

namespace gdn::kernels::cpu {

/// Returns body(static_cast<T*>(nullptr)) for the element type T that dtype stands for.
template <typename Body>
decltype(auto) with_element_type(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::f32:
      return body(static_cast<float*>(nullptr));
    case DType::bf16:
      return body(static_cast<hwy::bfloat16_t*>(nullptr));
    case DType::f16:
      return body(static_cast<hwy::float16_t*>(nullptr));
    case DType::f64:
      break;
  }
  throw std::invalid_argument("the SIMD kernels take fp32, bf16 and fp16; fp64 is the reference's");
}

}  // namespace gdn::kernels::cpu
