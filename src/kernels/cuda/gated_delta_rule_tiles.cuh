// Tiles of the portable chunked kernels: products of matrices in shared memory, and the loads that
// fill them.
//
// Everything in shared memory is fp32. 16-bit inputs are multiplied by the tensor cores. From
// compute capability 8.0 on in TF32: it holds bf16 and fp16 exactly, has the range of fp32, and
// rounds what lies between inputs and outputs to 2^-11. On 7.5 in fp16, which has as many digits,
// scaled so that no range is lost. fp32 inputs use fused multiply-adds.
//
// A block has 8 warps. In a product of 64 rows, warp w owns rows 16 (w % 4) to + 15 and one half,
// w / 4, of the columns: kTiles tiles of 8 columns. A thread holds of each tile, as the tensor
// cores do, rows g and g + 8 and columns 2 t and 2 t + 1, with g = lane / 4 and t = lane % 4.
//
// Row lengths: 4 mod 32 (or 20) where a warp reads 8 rows and 4 columns, 8 or 24 mod 32 where it
// reads 4 rows and 8 columns: no two of its words share a bank.
#pragma once

#include <gdn/kernels/cuda/device.cuh>

namespace gdn::kernels::cuda {

inline constexpr int kChunk = 64;  // tokens
inline constexpr int kTileThreads = 256;

/// What the operands of a product are rounded to.
enum class Products { f32, tf32, scaled_f16 };

/// Those of inputs of type T.
template <typename T>
__device__ constexpr Products products_of() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  return sizeof(T) == 2 ? Products::tf32 : Products::f32;
#else
  return sizeof(T) == 2 ? Products::scaled_f16 : Products::f32;
#endif
}

/// x as shared memory holds it for the products.
template <Products kProducts>
__device__ __forceinline__ float operand(float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  if constexpr (kProducts == Products::tf32) {
    uint32_t bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
    return __uint_as_float(bits);
  }
#endif
  return x;
}

/// c += a b for a [16, 8] and b [8, 8], in fragments of TF32 numbers.
__device__ __forceinline__ void multiply_fragments(float (&c)[4], const float (&a)[4],
                                                   const float (&b)[2]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])),
        "r"(__float_as_uint(a[3])), "r"(__float_as_uint(b[0])), "r"(__float_as_uint(b[1])));
#endif
}

/// The same in fp16, of fragments that lie as those of TF32: there a thread's two columns of `a`
/// (rows of b) are t and t + 4, of fp16 2 t and 2 t + 1, and a sum has no order.
__device__ __forceinline__ void multiply_fragments(float (&c)[4], const __half2 (&a)[2],
                                                   __half2 b) {
  unsigned words[3];
  memcpy(words, a, sizeof(a));
  memcpy(words + 2, &b, sizeof(b));
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(words[0]), "r"(words[1]), "r"(words[2]));
}

/// A power of two that brings numbers up to `largest` (at least 0) just below 2^15, where fp16 has
/// room for those down to 2^-29 of it with all their digits; and its inverse.
struct F16Scale {
  float up, down;

  __device__ __forceinline__ explicit F16Scale(float largest) {
    const unsigned exponent = __float_as_uint(largest) >> 23;  // biased by 127
    const unsigned scale = min(253U, 127 + 14 + 127 - exponent);
    up = __uint_as_float(scale << 23);
    down = __uint_as_float((254 - scale) << 23);
  }
};

/// A matrix in shared memory: element (i, j) at i * kStride + j, or transposed.
template <int kStride, bool kTransposed = false>
struct Operand {
  const float* data;

  __device__ __forceinline__ float operator()(int i, int j) const {
    return kTransposed ? data[j * kStride + i] : data[i * kStride + j];
  }
};

/// This thread's part of a product of 64 rows and 16 kTiles columns.
template <int kTiles>
struct Accumulator {
  float c[kTiles][4] = {};

  __device__ static int first_row() { return threadIdx.x / kWarp % 4 * 16 + threadIdx.x % 32 / 4; }
  __device__ static int first_column() {
    return threadIdx.x / kWarp / 4 * (kTiles * 8) + threadIdx.x % 4 * 2;
  }
  __device__ static int row(int e) { return first_row() + e / 2 * 8; }
  __device__ static int column(int tile, int e) { return first_column() + tile * 8 + e % 2; }

  /// body(row, column, value) for every element that this thread holds.
  template <typename Body>
  __device__ __forceinline__ void for_each(const Body& body) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int e = 0; e < 4; ++e) body(row(e), column(tile, e), c[tile][e]);
    }
  }

  /// body(row, column, left, right) for every two neighbours, columns `column` and `column` + 1.
  template <typename Body>
  __device__ __forceinline__ void for_pairs(const Body& body) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int e = 0; e < 4; e += 2) {
        body(row(e), column(tile, e), c[tile][e], c[tile][e + 1]);
      }
    }
  }

  /// Adds a b: a(row, l) and b(l, column) for l < kDepth. kRoundB: b is not yet rounded to TF32.
  template <Products kProducts, int kDepth, bool kRoundB = false, typename A, typename B>
  __device__ __forceinline__ void add_product(const A& a, const B& b) {
    const int t = threadIdx.x % 4, g = threadIdx.x % 32 / 4;
    const int rows = first_row(), columns = first_column();
    const auto a_fragment = [&](int l, float(&part)[4]) {
      part[0] = a(rows, l + t);
      part[1] = a(rows + 8, l + t);
      part[2] = a(rows, l + t + 4);
      part[3] = a(rows + 8, l + t + 4);
    };
    const auto b_fragment = [&](int l, int tile, float(&part)[2]) {
      const int column = columns - 2 * t + g + tile * 8;
      part[0] = b(l + t, column);
      part[1] = b(l + t + 4, column);
    };
    if constexpr (kProducts == Products::tf32) {
#pragma unroll
      for (int l = 0; l < kDepth; l += 8) {
        float a_part[4];
        a_fragment(l, a_part);
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          float b_part[2];
          b_fragment(l, tile, b_part);
          if constexpr (kRoundB) {
            b_part[0] = operand<kProducts>(b_part[0]);
            b_part[1] = operand<kProducts>(b_part[1]);
          }
          multiply_fragments(c[tile], a_part, b_part);
        }
      }
    } else if constexpr (kProducts == Products::scaled_f16) {
      constexpr int kSteps = kDepth / 8;
      float a_parts[kSteps][4], b_parts[kSteps][kTiles][2], a_most = 0.0F, b_most = 0.0F;
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        a_fragment(step * 8, a_parts[step]);
#pragma unroll
        for (int i = 0; i < 4; ++i) a_most = fmaxf(a_most, fabsf(a_parts[step][i]));
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          b_fragment(step * 8, tile, b_parts[step][tile]);
#pragma unroll
          for (int i = 0; i < 2; ++i) b_most = fmaxf(b_most, fabsf(b_parts[step][tile][i]));
        }
      }
      const F16Scale a_scale(warp_max(a_most)), b_scale(warp_max(b_most));
      float sums[kTiles][4] = {};
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const auto& x = a_parts[step];
        const __half2 a_part[2] = {__floats2half2_rn(x[0] * a_scale.up, x[2] * a_scale.up),
                                   __floats2half2_rn(x[1] * a_scale.up, x[3] * a_scale.up)};
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          const auto& y = b_parts[step][tile];
          multiply_fragments(sums[tile], a_part,
                             __floats2half2_rn(y[0] * b_scale.up, y[1] * b_scale.up));
        }
      }
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          c[tile][e] = fmaf(sums[tile][e] * a_scale.down, b_scale.down, c[tile][e]);
        }
      }
    } else {
#pragma unroll 8
      for (int l = 0; l < kDepth; ++l) {
        const float low = a(rows, l), high = a(rows + 8, l);
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          const float left = b(l, columns + tile * 8), right = b(l, columns + tile * 8 + 1);
          c[tile][0] = fmaf(low, left, c[tile][0]);
          c[tile][1] = fmaf(low, right, c[tile][1]);
          c[tile][2] = fmaf(high, left, c[tile][2]);
          c[tile][3] = fmaf(high, right, c[tile][3]);
        }
      }
    }
  }
};

/// Two neighbours in shared memory, at an even place.
__device__ __forceinline__ float2 get_pair(const float* from) {
  return *reinterpret_cast<const float2*>(from);
}
__device__ __forceinline__ void put_pair(float* to, float left, float right) {
  *reinterpret_cast<float2*>(to) = make_float2(left, right);
}

/// Two neighbours in device memory, the first `count` of them (the rest are 0); at once where
/// `pairs` promises that they are aligned and both there.
template <typename T>
__device__ __forceinline__ float2 load_pair(const T* from, int64_t count, bool pairs) {
  float x[2] = {};
  if (pairs && count > 0) {
    load<2>(from, x);
  } else {
    if (count > 0) x[0] = to_float(from[0]);
    if (count > 1) x[1] = to_float(from[1]);
  }
  return make_float2(x[0], x[1]);
}
template <typename T>
__device__ __forceinline__ void store_pair(T* to, float left, float right, int64_t count,
                                           bool pairs) {
  if (pairs && count > 0) {
    const float x[2] = {left, right};
    store<2>(to, x);
  } else {
    if (count > 0) to[0] = from_float<T>(left);
    if (count > 1) to[1] = from_float<T>(right);
  }
}

/// Rows of a matrix in device memory. Reads beyond its rows or columns give zeros.
template <typename T>
struct Rows {
  const T* data;
  int64_t stride;
  int rows, columns;
  bool vectors;  // rows may be read kVector<T> at a time

  /// kCount columns from j of row i.
  template <int kCount>
  __device__ __forceinline__ void read(int i, int j, float (&x)[kCount]) const {
    const T* from = data + i * stride + j;
    if (i < rows && j + kCount <= columns && vectors) {
      load<kCount>(from, x);
      return;
    }
#pragma unroll
    for (int c = 0; c < kCount; ++c) x[c] = i < rows && j + c < columns ? to_float(from[c]) : 0.0F;
  }
};

/// How the threads of a block share a tile of kRows x kColumns in shared memory.
template <int kRows, int kColumns, int kStride>
struct TileShape {
  static constexpr int kCount = kRows * kColumns / kTileThreads;  // consecutive elements a thread
  static constexpr int kFloats = kRows * kStride;

  __device__ static int row() { return threadIdx.x * kCount / kColumns; }
  __device__ static int column() { return threadIdx.x * kCount % kColumns; }

  template <Products kProducts>
  __device__ static void put(float* tile, const float (&x)[kCount], float factor) {
    float* to = tile + row() * kStride + column();
#pragma unroll
    for (int c = 0; c < kCount; c += 4) {
      *reinterpret_cast<float4*>(to + c) =
          make_float4(operand<kProducts>(x[c] * factor), operand<kProducts>(x[c + 1] * factor),
                      operand<kProducts>(x[c + 2] * factor), operand<kProducts>(x[c + 3] * factor));
    }
  }
};

/// 64 rows of tokens, 32 columns: the left factor, row by row.
using RowTile = TileShape<64, 32, 36>;
/// 32 rows of tokens, 64 columns: the left factor transposed, or the right one.
using DepthTile = TileShape<32, 64, 72>;
/// As large as both are.
inline constexpr int kStageFloats = 64 * 36;
static_assert(RowTile::kFloats == kStageFloats && DepthTile::kFloats == kStageFloats);

/// Fills `stage` step after step and calls compute(step) when it is full. fetch(step, x) reads what
/// this thread puts there, ahead of its use; factor(step) scales it.
template <typename Tile, Products kProducts, typename Fetch, typename Factor, typename Compute>
__device__ __forceinline__ void for_steps(int steps, float* stage, const Fetch& fetch,
                                          const Factor& factor, const Compute& compute) {
  float x[Tile::kCount];
  fetch(0, x);
  for (int step = 0; step < steps; ++step) {
    __syncthreads();  // the last use of the stage is over
    Tile::template put<kProducts>(stage, x, factor(step));
    __syncthreads();
    if (step + 1 < steps) fetch(step + 1, x);
    compute(step);
  }
}

/// acc += left right, for left [64, 32 steps] in device memory and right(l, column) in shared.
template <Products kProducts, bool kRoundB, typename T, int kTiles, typename Right>
__device__ __forceinline__ void add_rows_product(Accumulator<kTiles>& acc, const Rows<T>& left,
                                                 int steps, float* stage, const Right& right) {
  for_steps<RowTile, kProducts>(
      steps, stage,
      [&](int step, auto& x) { left.read(RowTile::row(), step * 32 + RowTile::column(), x); },
      [](int) { return 1.0F; },
      [&](int step) {
        const Operand<36> a = {stage};
        acc.template add_product<kProducts, 32, kRoundB>(
            a, [&](int l, int column) { return right(step * 32 + l, column); });
      });
}

/// acc += left^T diag(factor) right, for left [64 tokens, columns j to j + 63] in device memory and
/// right(token, column) in shared.
template <Products kProducts, typename T, int kTiles, typename Factor, typename Right>
__device__ __forceinline__ void add_transposed_product(Accumulator<kTiles>& acc,
                                                       const Rows<T>& left, int j,
                                                       const Factor& factor, float* stage,
                                                       const Right& right) {
  for_steps<DepthTile, kProducts>(
      2, stage,
      [&](int step, auto& x) {
        left.read(step * 32 + DepthTile::row(), j + DepthTile::column(), x);
      },
      [&](int step) { return factor(step * 32 + DepthTile::row()); },
      [&](int step) {
        const Operand<72, true> a = {stage};
        acc.template add_product<kProducts, 32>(
            a, [&](int l, int column) { return right(step * 32 + l, column); });
      });
}

}  // namespace gdn::kernels::cuda
