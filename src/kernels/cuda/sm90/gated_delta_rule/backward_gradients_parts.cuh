// What one role of a gradients kernel does with its products in registers, for heads of 128 and for
// wide heads alike; backward_gradients.cuh has the derivation.
#pragma once

#include <gdn/kernels/cuda/sm90/gated_delta_rule/backward_gradients_loads.cuh>
#include <gdn/kernels/cuda/sm90/gated_delta_rule/chunk_matrices.cuh>
#include <gdn/kernels/cuda/sm90/gated_delta_rule/state.cuh>

namespace gdn::kernels::cuda::sm90 {

/// Sums over the four lanes that share rows of an accumulator.
__device__ __forceinline__ float sum_row(float x) {
  x += __shfl_xor_sync(0xffffffffU, x, 1);
  return x + __shfl_xor_sync(0xffffffffU, x, 2);
}

/// Sums `columns` over the eight lanes that share columns of an accumulator; lane l is left with
/// the two of columns 8 n, n as returned.
__device__ __forceinline__ int sum_columns(const float2 (&columns)[8], int lane, float2& sum) {
  constexpr uint32_t kWarp = 0xffffffffU;
  const auto exchange = [](float2 mine, float2 other, bool upper, int distance) {
    const float2 keep = upper ? other : mine;
    const float2 send = upper ? mine : other;
    return float2{keep.x + __shfl_xor_sync(kWarp, send.x, distance),
                  keep.y + __shfl_xor_sync(kWarp, send.y, distance)};
  };
  float2 four[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    four[i] = exchange(columns[i], columns[i + 4], (lane & 16) != 0, 16);
  }
  float2 two[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) two[i] = exchange(four[i], four[i + 2], (lane & 8) != 0, 8);
  sum = exchange(two[0], two[1], (lane & 4) != 0, 4);
  return (lane & 16) / 4 + (lane & 8) / 4 + (lane & 4) / 4;
}

/// Whether a result is added to what is there, or takes its place. In that case it may be the array
/// that it is made from.
enum class Result { kAdded, kStored };

/// gradient (+)= diag(factor) product; sums[i] = dot_factor_i (row i of the product) . (row i of
/// the [64 tokens, 128] tile `keys` of Q or K).
template <typename Element, Result kResult = Result::kAdded>
__device__ __forceinline__ void add_product(float (&gradient)[64], const float (&product)[64],
                                            uint32_t keys, const float (&factor)[2],
                                            const float (&dot_factor)[2], float* sums,
                                            const Fragment& at) {
  float dot[2] = {0, 0};
#pragma unroll
  for (int block = 0; block < 8; ++block) {
    uint32_t packed[4];
    load_matrices(packed,
                  block_row(keys + (block / 4) * kHalfTileBytes, at.warp, block % 4, at.lane));
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      const int r = m % 2;
      const int e = 8 * block + 2 * m;
      const float2 key = unpack<Element>(packed[m]);
      const float2 x = {product[e], product[e + 1]};
      if constexpr (kResult == Result::kAdded) {
        gradient[e] += factor[r] * x.x;
        gradient[e + 1] += factor[r] * x.y;
      } else {
        gradient[e] = factor[r] * x.x;
        gradient[e + 1] = factor[r] * x.y;
      }
      dot[r] += x.x * key.x;
      dot[r] += x.y * key.y;
    }
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float sum = dot_factor[r] * sum_row(dot[r]);
    if (at.lane % 4 == 0) sums[16 * at.warp + at.row + 8 * r] = sum;
  }
}

/// dP or dG (`pairs`) from `product`, dO U^^T or dV U^^T; and the sums of Y, with `scores`, Q K^T
/// or K K^T. Every warp goes through all columns, those above the diagonal too: the code is met
/// once a piece of work, and what it costs is to fetch it, jumps most of all.
template <Role kRole, Result kResult = Result::kAdded>
__device__ __forceinline__ void add_pairs(float (&pairs)[32], const float (&product)[32],
                                          const float (&scores)[32], const GateVectors& gates,
                                          float scale, ChunkSums& sums, const Fragment& at) {
  constexpr bool kQuery = kRole == Role::kQuery;
  constexpr int kIndex = kQuery ? 0 : 1;
  const int first_row = 16 * at.warp + at.row;
  const float b[2] = {gates.b[first_row], gates.b[first_row + 8]};
  const float factor = kQuery ? scale : -1.0F;
  float rows[2] = {0, 0};
  float diagonal[2] = {0, 0};
  float2 columns[8];
#pragma unroll
  for (int n = 0; n < 8; ++n) {
    const float2 b_j = *reinterpret_cast<const float2*>(&gates.b[8 * n + at.column]);
    const float2 beta = *reinterpret_cast<const float2*>(&gates.beta[8 * n + at.column]);
    columns[n] = {0, 0};
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int x = 0; x < 2; ++x) {
        const int distance = first_row + 8 * r - at.column - (8 * n + x);  // row less column
        const int e = 4 * n + 2 * r + x;
        // Above the diagonal the exponent is positive: select, never multiply by zero.
        const float decay = exp2_approx(b[r] - (x == 0 ? b_j.x : b_j.y)) * factor;
        const float d = distance >= (kQuery ? 0 : 1) ? decay * product[e] : 0.0F;
        const float d_u = d * (x == 0 ? beta.x : beta.y);
        pairs[e] = kResult == Result::kAdded ? pairs[e] + d_u : d_u;
        const float below = distance > 0 ? scores[e] : 0.0F;
        if constexpr (kQuery) diagonal[r] = distance == 0 ? scores[e] * d : diagonal[r];
        rows[r] += below * d_u;
        (x == 0 ? columns[n].x : columns[n].y) += below * d;
      }
    }
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float sum = sum_row(rows[r]);
    if (at.lane % 4 == 0) sums.row[kIndex][first_row + 8 * r] = sum;
    // The lane that has the row's element on the diagonal.
    if (kQuery && at.row / 2 == at.lane % 4) sums.diagonal[first_row + 8 * r] = diagonal[r];
  }
  float2 column;
  const int n = sum_columns(columns, at.lane, column);
  *reinterpret_cast<float2*>(&sums.column[kIndex][at.warp][8 * n + at.column]) = column;
}

/// What the whole group's dP and dG (`pairs`) give, times Q and K: 128 columns of dQ or dK, of the
/// block's n-th chunk.
template <typename Element, Role kRole, typename Shared>
__device__ __forceinline__ void add_within_chunk(float (&gradient)[64], const float (&pairs)[32],
                                                 Shared& shared, uint32_t n, const Fragment& at) {
  constexpr bool kQuery = kRole == Role::kQuery;
  const uint64_t q_columns = swizzled_tile(shared_address(shared.q), kHalfTileBytes);
  const uint64_t k_columns = swizzled_tile(shared_address(shared.k), kHalfTileBytes);
  const uint32_t own = shared_address(kQuery ? shared.d_p : shared.d_g);
  const uint32_t parity = n % 2;
  uint32_t operand[4][4];
  to_operand<Element>(pairs, operand);
  if constexpr (kQuery) {
    mbarrier_wait(shared_address(&shared.d_p_empty[0]), parity ^ 1);
  } else {
    // Every warp is done with dG^T of the chunk before.
    named_barrier_sync(kKeyRoleBarrier, 128);
  }
#pragma unroll
  for (int block = 0; block < 4; ++block) {
    if (block <= at.warp) {
      store_matrices_transposed(token_row(own, block, at.warp, at.lane), operand[block][0],
                                operand[block][1], operand[block][2], operand[block][3]);
    }
  }
  fence_async_proxy();
  if constexpr (kQuery) {
    release(shared.d_p_full[0], at.lane);
  } else {
    named_barrier_sync(kKeyRoleBarrier, 128);
    mbarrier_wait(shared_address(&shared.d_p_full[0]), parity);
  }
  pin(gradient);
  wgmma_fence();
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    wgmma<Element, 128, Major::kOuter>(gradient, operand[j], advance(k_columns, j * 16 * 128), 1);
  }
  if constexpr (!kQuery) {
    const uint64_t d_g = swizzled_tile(own);
    const uint64_t d_p = swizzled_tile(shared_address(shared.d_p));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      wgmma<Element, 128, Major::kOuter>(gradient, advance(d_g, i * 32),
                                         advance(k_columns, i * 16 * 128), 1);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      wgmma<Element, 128, Major::kOuter>(gradient, advance(d_p, i * 32),
                                         advance(q_columns, i * 16 * 128), 1);
    }
  }
  wgmma_commit();
  wgmma_wait<0>();
  pin(gradient);
  pin(operand);
  if constexpr (!kQuery) release(shared.d_p_empty[0], at.lane);
  release(shared.key_empty[0], at.lane);
}

/// Of a 4 x 4 matrix of words, `words` a lane's row of four neighbouring lanes: the lane's column.
__device__ __forceinline__ void transpose_quad(uint32_t (&words)[4], int lane) {
  const auto exchange = [&](uint32_t& low, uint32_t& high, int distance) {
    const bool upper = (lane & distance) != 0;
    const uint32_t other = __shfl_xor_sync(0xffffffffU, upper ? low : high, distance);
    (upper ? low : high) = other;
  };
  exchange(words[0], words[1], 1);
  exchange(words[2], words[3], 1);
  exchange(words[0], words[2], 2);
  exchange(words[1], words[3], 2);
}

/// Writes 128 columns of dQ or dK from column `first` on, those that there are of `size`, 16 bytes
/// a lane.
template <typename Element>
__device__ __forceinline__ void store_gradient(const float (&gradient)[64],
                                               const MutableView4& view, const Work& work, int c,
                                               const Fragment& at, int first = 0,
                                               int size = kHeadDim) {
  const int tokens = work.tokens(c);
  const int row = 16 * at.warp + at.row;
  const int column = first + 8 * (at.lane % 4);
  uint16_t* out = static_cast<uint16_t*>(view.data) + work.batch * view.stride_b +
                  (work.begin + int64_t{c} * kChunk + row) * view.stride_t +
                  work.key_head * view.stride_h + column;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; n += 4) {
      // Columns 8 n to 8 n + 31: the lane's two of each eight, then its eight of them all.
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int e = 4 * (n + i) + 2 * r;
        words[i] = pack<Element>(gradient[e], gradient[e + 1]);
      }
      transpose_quad(words, at.lane);
      store_global_16_bytes(out + 8 * n, {words[0], words[1], words[2], words[3]},
                            row + 8 * r < tokens && column + 8 * n < size);
    }
    out += 8 * view.stride_t;
  }
}

/// This thread's share of the inner product of two tiles of 16 KB.
template <typename Element>
__device__ __forceinline__ float inner_product(uint32_t x, uint32_t y, int thread) {
  float sum = 0;
#pragma unroll 4
  for (int i = 0; i < kTileBytes / 16 / 128; ++i) {
    const uint4 a = load_16_bytes(x + static_cast<uint32_t>(i * 128 + thread) * 16);
    const uint4 b = load_16_bytes(y + static_cast<uint32_t>(i * 128 + thread) * 16);
    const uint32_t left[4] = {a.x, a.y, a.z, a.w};
    const uint32_t right[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float2 l = unpack<Element>(left[e]);
      const float2 r = unpack<Element>(right[e]);
      sum += l.x * r.x;
      sum += l.y * r.y;
    }
  }
  return sum;
}

__device__ __forceinline__ float sum_warp(float x) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    x += __shfl_xor_sync(0xffffffffU, x, distance);
  }
  return x;
}

}  // namespace gdn::kernels::cuda::sm90
