// What the portable kernels share: elements of any dtype as fp32, several at a time; sums over a
// warp or block; and on the host the element type of a DType and the check after a launch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdexcept>
#include <string>
#include <type_traits>

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

/// Of the current device.
inline int multiprocessors() {
  int device = 0, count = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  check_launch("multiprocessors");
  return count;
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

/// What is loaded or stored at once.
template <int kBytes>
struct WordOf;
template <>
struct WordOf<2> {
  using Type = unsigned short;
};
template <>
struct WordOf<4> {
  using Type = unsigned;
};
template <>
struct WordOf<8> {
  using Type = uint2;
};
template <>
struct WordOf<16> {
  using Type = uint4;
};

/// kCount elements in one word: as many registers as they have bytes, where elements of 2 bytes
/// would take one each.
template <typename T, int kCount>
struct Vector {
  using Word = typename WordOf<static_cast<int>(sizeof(T)) * kCount>::Type;
  Word word;
};

/// Elements of a 16-byte access.
template <typename T>
inline constexpr int kVector = 16 / static_cast<int>(sizeof(T));

template <int kCount, typename T>
__device__ __forceinline__ void unpack(const Vector<T, kCount>& v, float (&x)[kCount]) {
  constexpr int kBytes = static_cast<int>(sizeof(T)) * kCount;
  unsigned words[kBytes < 4 ? 1 : kBytes / 4] = {};
  memcpy(words, &v.word, kBytes);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if constexpr (std::is_same_v<T, float>) {
      x[i] = __uint_as_float(words[i]);
    } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {  // the upper half of an fp32
      x[i] = __uint_as_float(i % 2 == 0 ? words[i / 2] << 16 : words[i / 2] & 0xFFFF0000U);
    } else {
      const unsigned bits = i % 2 == 0 ? words[i / 2] & 0xFFFFU : words[i / 2] >> 16;
      x[i] = __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
    }
  }
}

template <typename T, int kCount>
__device__ __forceinline__ Vector<T, kCount> pack(const float (&x)[kCount]) {
  Vector<T, kCount> v;
  T elements[kCount];
  if constexpr (sizeof(T) == 2 && kCount % 2 == 0) {  // two at a time
    using Two = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
#pragma unroll
    for (int i = 0; i < kCount; i += 2) {
      Two two;
      if constexpr (std::is_same_v<T, __half>) {
        two = __floats2half2_rn(x[i], x[i + 1]);
      } else {
        two = __floats2bfloat162_rn(x[i], x[i + 1]);
      }
      memcpy(&elements[i], &two, sizeof(two));
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) elements[i] = from_float<T>(x[i]);
  }
  memcpy(&v.word, elements, sizeof(elements));
  return v;
}

/// The vector at p, which is aligned to its size and which nothing writes while the kernel runs:
/// such loads may be moved before stores, and several be on their way at once.
template <int kCount, typename T>
__device__ __forceinline__ Vector<T, kCount> load_constant(const T* p) {
  return {__ldg(reinterpret_cast<const typename Vector<T, kCount>::Word*>(p))};
}

/// kCount elements at p, which is aligned to as many, or to 16 bytes where they are more.
template <int kCount, typename T>
__device__ __forceinline__ void load(const T* p, float (&x)[kCount]) {
  constexpr int kPiece = kCount < kVector<T> ? kCount : kVector<T>;
#pragma unroll
  for (int i = 0; i < kCount; i += kPiece) {
    float piece[kPiece];
    using Piece = Vector<T, kPiece>;
    unpack(Piece{*reinterpret_cast<const typename Piece::Word*>(p + i)}, piece);
#pragma unroll
    for (int j = 0; j < kPiece; ++j) x[i + j] = piece[j];
  }
}

template <int kCount, typename T>
__device__ __forceinline__ void store(T* p, const float (&x)[kCount]) {
  const Vector<T, kCount> v = pack<T>(x);
  *reinterpret_cast<typename Vector<T, kCount>::Word*>(p) = v.word;
}

/// kCount elements at index i of an array of T or, where it is fp32, of floats, that nothing writes
/// while the kernel runs.
template <typename T, int kCount>
__device__ __forceinline__ void load_parameter(const void* data, DType dtype, int64_t i,
                                               float (&x)[kCount]) {
  if (dtype != DType::f32) {
    unpack(load_constant<kCount>(static_cast<const T*>(data) + i), x);
    return;
  }
  constexpr int kPiece = kCount < 4 ? kCount : 4;  // at most 16 bytes
#pragma unroll
  for (int j = 0; j < kCount; j += kPiece) {
    float piece[kPiece];
    unpack(load_constant<kPiece>(static_cast<const float*>(data) + i + j), piece);
#pragma unroll
    for (int l = 0; l < kPiece; ++l) x[j + l] = piece[l];
  }
}

inline constexpr float kLog2E = 1.44269504F;

/// 2^x; relative error below 2^-22. Below 2^-126: zero.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// Four instructions, where an exact exponential and division take 20, more than the memory leaves
/// time for. Relative error below (4 + |x|) 2^-24, and zero below -87: of x sigmoid(x) that is less
/// than 2^-22 of the largest value around.
__device__ __forceinline__ float sigmoid(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(1.0F + exp2_fast(-kLog2E * x)));
  return y;
}
__device__ __forceinline__ float silu(float x) { return x * sigmoid(x); }
/// The derivative of silu at x, whose sigmoid is s.
__device__ __forceinline__ float silu_gradient(float x, float s) {
  return fmaf(s, fmaf(-s, x, x), s);  // s + s (1 - s) x
}
__device__ __forceinline__ float silu_gradient(float x) { return silu_gradient(x, sigmoid(x)); }

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

/// Sums over the kThreads threads that share a row: part of a warp, a warp, or several (then all
/// threads of the block call it).
template <int kThreads, int kCount>
__device__ __forceinline__ void row_sums(float (&x)[kCount]) {
#pragma unroll
  for (int d = (kThreads < kWarp ? kThreads : kWarp) / 2; d > 0; d /= 2) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] += __shfl_xor_sync(0xFFFFFFFFU, x[i], d);
  }
  if constexpr (kThreads > kWarp) {
    constexpr int kWarps = kThreads / kWarp;
    __shared__ float parts[kCount][kWarp];  // a block has at most that many warps
    const int warp = static_cast<int>(threadIdx.x) / kWarp, first = warp / kWarps * kWarps;
    __syncthreads();  // whoever still reads the last sum's parts
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (threadIdx.x % kWarp == 0) parts[i][warp] = x[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      x[i] = 0.0F;
#pragma unroll
      for (int j = 0; j < kWarps; ++j) x[i] += parts[i][first + j];
    }
  }
}

template <int kThreads>
__device__ __forceinline__ float row_sum(float x) {
  float sum[1] = {x};
  row_sums<kThreads>(sum);
  return sum[0];
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
