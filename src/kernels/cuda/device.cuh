// What the portable kernels share: elements of any dtype as fp32, several at a time; sums over a
// warp or block; and on the host the element type of a DType and the check after a launch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdexcept>
#include <string>

#include <gdn/kernels/types.h>

namespace gdn::kernels::cuda {

inline constexpr int kWarp = 32;

/// Throws when the launch before it failed.
inline void check_launch(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("CUDA kernel ") + kernel + ": " +
                             cudaGetErrorString(error));
  }
}

/// Returns body(static_cast<T*>(nullptr)) for the element type T that dtype stands for.
template <typename Body>
decltype(auto) with_element_type(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::f32:
      return body(static_cast<float*>(nullptr));
    case DType::bf16:
      return body(static_cast<__nv_bfloat16*>(nullptr));
    case DType::f16:
      return body(static_cast<__half*>(nullptr));
    case DType::f64:
      break;
  }
  throw std::invalid_argument("the CUDA kernels take fp32, bf16 and fp16; fp64 is the CPU's");
}

inline int64_t element_size(DType dtype) { return dtype == DType::f32 ? 4 : 2; }
inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// Bytes of `count` floats, rounded up so that what follows them in scratch memory is aligned.
inline int64_t scratch_floats(int64_t count) { return divide_up(count * 4, 256) * 256; }

/// Whether rows at `data`, `stride` elements apart, may be read `bytes` at a time.
template <typename T>
bool rows_aligned(const void* data, int64_t stride, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(data) % bytes == 0 &&
         stride * static_cast<int64_t>(sizeof(T)) % bytes == 0;
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}

template <typename T, int kCount>
struct alignas(sizeof(T) * kCount) Vector {
  T elements[kCount];
};

/// Elements of a 16-byte access.
template <typename T>
inline constexpr int kVector = 16 / static_cast<int>(sizeof(T));

/// kCount elements at p, which is aligned to as many.
template <int kCount, typename T>
__device__ __forceinline__ void load(const T* p, float (&x)[kCount]) {
  constexpr int kBytes = static_cast<int>(sizeof(T)) * kCount;
  if constexpr (kBytes > 16) {  // fp32 beside a 16-bit type
    constexpr int kHalf = kCount / 2;
    float low[kHalf], high[kHalf];
    load<kHalf>(p, low);
    load<kHalf>(p + kHalf, high);
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      x[i] = low[i];
      x[kHalf + i] = high[i];
    }
  } else {
    const auto v = *reinterpret_cast<const Vector<T, kCount>*>(p);
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] = to_float(v.elements[i]);
  }
}

template <int kCount, typename T>
__device__ __forceinline__ void store(T* p, const float (&x)[kCount]) {
  static_assert(sizeof(T) * kCount <= 16);
  Vector<T, kCount> v;
#pragma unroll
  for (int i = 0; i < kCount; ++i) v.elements[i] = from_float<T>(x[i]);
  *reinterpret_cast<Vector<T, kCount>*>(p) = v;
}

/// kCount elements at index i of an array of T or, where it is fp32, of floats.
template <typename T, int kCount>
__device__ __forceinline__ void load_parameter(const void* data, DType dtype, int64_t i,
                                               float (&x)[kCount]) {
  if (dtype == DType::f32) {
    load<kCount>(static_cast<const float*>(data) + i, x);
  } else {
    load<kCount>(static_cast<const T*>(data) + i, x);
  }
}

__device__ __forceinline__ float sigmoid(float x) { return 1.0F / (1.0F + expf(-x)); }
__device__ __forceinline__ float silu(float x) { return x * sigmoid(x); }
__device__ __forceinline__ float silu_gradient(float x) {
  const float s = sigmoid(x);
  return s * (1.0F + x * (1.0F - s));
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int d = kWarp / 2; d > 0; d /= 2) x += __shfl_xor_sync(0xFFFFFFFFU, x, d);
  return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int d = kWarp / 2; d > 0; d /= 2) x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFFU, x, d));
  return x;
}

/// The sum over the kThreads threads that share a row: part of a warp, a warp, or a whole block.
template <int kThreads>
__device__ __forceinline__ float row_sum(float x) {
#pragma unroll
  for (int d = (kThreads < kWarp ? kThreads : kWarp) / 2; d > 0; d /= 2) {
    x += __shfl_xor_sync(0xFFFFFFFFU, x, d);
  }
  if constexpr (kThreads > kWarp) {
    __shared__ float parts[kThreads / kWarp];
    __syncthreads();  // whoever still reads the last sum's parts
    if (threadIdx.x % kWarp == 0) parts[threadIdx.x / kWarp] = x;
    __syncthreads();
    x = 0.0F;
#pragma unroll
    for (int i = 0; i < kThreads / kWarp; ++i) x += parts[i];
  }
  return x;
}

template <int kThreads>
__device__ __forceinline__ float block_max(float x) {
  __shared__ float parts[kThreads / kWarp];
  x = warp_max(x);
  __syncthreads();
  if (threadIdx.x % kWarp == 0) parts[threadIdx.x / kWarp] = x;
  __syncthreads();
  x = parts[0];
#pragma unroll
  for (int i = 1; i < kThreads / kWarp; ++i) x = fmaxf(x, parts[i]);
  return x;
}

}  // namespace gdn::kernels::cuda
