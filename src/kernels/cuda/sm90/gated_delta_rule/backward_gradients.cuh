// The gradients that need no scan: with S, dS', U^ and dV of every chunk known, each chunk of each
// key head is a piece of work of its own. Its value heads follow each other; dQ and dK gather their
// parts in registers. With G = strict_lower(K K^T * D), x^ for x of U^ instead of U = diag(beta)
// U^:
//
//   dP = scale lower(dO U^T) * D     dG = -strict_lower(dV U^T) * D
//   dQ = scale diag(exp b) dO S^T + dP K
//   dK = -diag(exp b) dV S^T + diag(exp(b_C - b)) U dS'^T + (dG + dG^T) K + dP^T Q
//
// The gradient of g_t adds up every path that crosses token t
// (reference/gated_delta_rule_backward.cpp says why), and that of beta the same terms again: with Y
// = Q K^T * dP^ + K K^T * dG^,
//   r_i = scale exp(b_i) q_i . (dO S^T)_i - exp(b_i) k_i . (dV S^T)_i     start to token i
//   w_j = exp(b_C - b_j) k_j . (U^ dS'^T)_j                               token j to end
//   dbeta_j = w_j + sum_{i >= j} Y_ij
//   dg_t = exp(b_C) <S, dS'> + sum_{i >= t} r_i + sum_{j < t} beta_j w_j + sum_{j < t <= i} beta_j
//   Y_ij
// The last sum is a running one of column sums less row sums of one and the same matrix without its
// diagonal: rounding of fp32 is all that remains where terms cancel.
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

template <typename Element, Role kRole>
struct GradientRole {
  static constexpr bool kQuery = kRole == Role::kQuery;

  const BackwardArguments& p;
  GradientShared& shared;
  Fragment at;
  int thread;
  float gradient[64];  // dQ, dK
  float pairs[32];     // dP, dG
  float scores[32];    // Q K^T, K K^T

  __device__ __forceinline__ GradientRole(const BackwardArguments& p, GradientShared& shared,
                                          int thread)
      : p(p), shared(shared), at(thread), thread(thread) {}

  __device__ __forceinline__ void release(uint64_t& barrier) const {
    __syncwarp();
    if (at.lane == 0) mbarrier_arrive(shared_address(&barrier));
  }
  /// Address of tile n, once it is there.
  __device__ __forceinline__ uint32_t wait_tile(uint32_t n) const {
    const auto stage = slot(shared.full, n);
    mbarrier_wait(shared_address(&shared.full[stage.stage]), stage.parity);
    return shared_address(shared.tiles[stage.stage]);
  }
  __device__ __forceinline__ void release_tile(uint32_t n) const {
    release(shared.empty[slot(shared.full, n).stage]);
  }
  __device__ __forceinline__ uint32_t own_keys() const {
    return shared_address(kQuery ? shared.q : shared.k);
  }

  /// product = left [64 tokens, V] states, states the two halves of V of S^T or dS'^T.
  __device__ __forceinline__ void multiply_by_states(float (&product)[64], uint32_t left,
                                                     uint32_t states_0, uint32_t states_1) const {
    pin(product);
    wgmma_fence();
#pragma unroll
    for (int s = 0; s < 8; ++s) {
      const uint64_t left_tile = swizzled_tile(left + (s / 4) * kHalfTileBytes);
      const uint64_t states = swizzled_tile(s < 4 ? states_0 : states_1, kHalfTileBytes);
      wgmma<Element, 128, Major::kOuter>(product, advance(left_tile, s % 4 * 32),
                                         advance(states, s % 4 * 16 * 128), s > 0);
    }
    wgmma_commit();
    wgmma_wait<0>();
    pin(product);
  }

  /// Adds diag(factor) product to the gradient; sums[i] = dot_factor_i (row i of the product) .
  /// (row i of Q or K).
  __device__ __forceinline__ void add_product(const float (&product)[64], const float (&factor)[2],
                                              const float (&dot_factor)[2], float* sums) {
    float dot[2] = {0, 0};
    const uint32_t keys = own_keys();
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
        gradient[e] += factor[r] * product[e];
        gradient[e + 1] += factor[r] * product[e + 1];
        dot[r] += product[e] * key.x;
        dot[r] += product[e + 1] * key.y;
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float sum = dot_factor[r] * sum_row(dot[r]);
      if (at.lane % 4 == 0) sums[16 * at.warp + at.row + 8 * r] = sum;
    }
  }

  /// From `product`, dO U^^T or dV U^^T, to dP or dG, and the sums of Y.
  __device__ __forceinline__ void add_pairs(const float (&product)[32], const GateVectors& gates,
                                            ChunkSums& sums) {
    constexpr int kIndex = kQuery ? 0 : 1;
    const int first_row = 16 * at.warp + at.row;
    const float b[2] = {gates.b[first_row], gates.b[first_row + 8]};
    const float factor = kQuery ? p.scale : -1.0F;
    float rows[2] = {0, 0};
    float2 columns[8];
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      columns[n] = {0, 0};
      if (n / 2 > at.warp) continue;  // above the diagonal
      const float2 b_j = *reinterpret_cast<const float2*>(&gates.b[8 * n + at.column]);
      const float2 beta = *reinterpret_cast<const float2*>(&gates.beta[8 * n + at.column]);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = first_row + 8 * r;
#pragma unroll
        for (int x = 0; x < 2; ++x) {
          const int column = 8 * n + at.column + x;
          const int e = 4 * n + 2 * r + x;
          const bool below = row > column;
          const bool on = row == column;
          // Above the diagonal the exponent is positive: select, never multiply by zero.
          const float decay = exp2_approx(b[r] - (x == 0 ? b_j.x : b_j.y)) * factor;
          const float d = below || (kQuery && on) ? decay * product[e] : 0.0F;
          const float d_u = d * (x == 0 ? beta.x : beta.y);
          pairs[e] += d_u;
          if constexpr (kQuery) {
            if (on) sums.diagonal[row] = scores[e] * d;
          }
          if (below) {
            rows[r] += scores[e] * d_u;
            (x == 0 ? columns[n].x : columns[n].y) += scores[e] * d;
          }
        }
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float sum = sum_row(rows[r]);
      if (at.lane % 4 == 0) sums.row[kIndex][first_row + 8 * r] = sum;
    }
    float2 column;
    const int n = sum_columns(columns, at.lane, column);
    *reinterpret_cast<float2*>(&sums.column[kIndex][at.warp][8 * n + at.column]) = column;
  }

  /// One value head; `first` is the number of its first tile.
  __device__ __forceinline__ void add_head(uint32_t head, uint32_t first) {
    const auto gate = slot(shared.gate_full, head);
    const auto stage = slot(shared.sums_full, head);
    const GateVectors& gates = shared.gates[gate.stage];
    ChunkSums& sums = shared.sums[stage.stage];
    const int rows[2] = {16 * at.warp + at.row, 16 * at.warp + at.row + 8};
    mbarrier_wait(shared_address(&shared.gate_full[gate.stage]), gate.parity);
    mbarrier_wait(shared_address(&shared.sums_empty[stage.stage]), stage.parity ^ 1);
    const uint32_t d_o = wait_tile(first + kTileDO);
    const uint32_t u = wait_tile(first + kTileU);
    if constexpr (!kQuery) release_tile(first + kTileDO);
    const uint32_t d_v = wait_tile(first + kTileDV);
    const uint32_t left = kQuery ? d_o : d_v;
    {
      float product[32];
      issue_product<Element>(product, left, u);
      wgmma_wait<0>();
      pin(product);
      if constexpr (kQuery) {
        release_tile(first + kTileU);
        release_tile(first + kTileDV);
      }
      add_pairs(product, gates, sums);
    }
    float product[64];
    const uint32_t s_0 = wait_tile(first + kTileS);
    const uint32_t s_1 = wait_tile(first + kTileS + 1);
    multiply_by_states(product, left, s_0, s_1);
    release_tile(first + (kQuery ? kTileDO : kTileDV));
    if constexpr (kQuery) {
      const float factor[2] = {gates.from_start_scaled[rows[0]], gates.from_start_scaled[rows[1]]};
      add_product(product, factor, factor, sums.read[0]);
      const uint32_t d_s_0 = wait_tile(first + kTileDS);
      const uint32_t d_s_1 = wait_tile(first + kTileDS + 1);
      const float sum = inner_product(s_0, d_s_0) + inner_product(s_1, d_s_1);
      sums.through[at.warp] = sum_warp(sum);
      release_tile(first + kTileS);
      release_tile(first + kTileS + 1);
    } else {
      release_tile(first + kTileS);
      release_tile(first + kTileS + 1);
      const float factor[2] = {-gates.from_start[rows[0]], -gates.from_start[rows[1]]};
      add_product(product, factor, factor, sums.read[1]);
      const uint32_t d_s_0 = wait_tile(first + kTileDS);
      const uint32_t d_s_1 = wait_tile(first + kTileDS + 1);
      multiply_by_states(product, u, d_s_0, d_s_1);
      release_tile(first + kTileU);
      const float to_end[2] = {gates.to_end[rows[0]], gates.to_end[rows[1]]};
      const float written[2] = {gates.written[rows[0]], gates.written[rows[1]]};
      add_product(product, written, to_end, sums.written);
    }
    release_tile(first + kTileDS);
    release_tile(first + kTileDS + 1);
    release(shared.gate_empty[gate.stage]);
    release(shared.sums_full[stage.stage]);
  }

  /// What the whole group's dP and dG give, times Q and K.
  __device__ __forceinline__ void add_within_chunk(uint32_t n) {
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
      release(shared.d_p_full[0]);
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
    if constexpr (!kQuery) release(shared.d_p_empty[0]);
    release(shared.key_empty[0]);
  }

  __device__ __forceinline__ void store_gradient(const Work& work, int c) const {
    const MutableView4& view = kQuery ? p.d_q : p.d_k;
    const int tokens = work.tokens(c);
    auto* out = static_cast<uint16_t*>(view.data) + work.batch * view.stride_b +
                (work.begin + int64_t{c} * kChunk) * view.stride_t + work.key_head * view.stride_h;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = 16 * at.warp + at.row + 8 * r;
      if (row >= tokens) continue;
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) {
        *reinterpret_cast<uint32_t*>(out + row * view.stride_t + 8 * n + at.column) =
            pack<Element>(gradient[4 * n + 2 * r], gradient[4 * n + 2 * r + 1]);
      }
    }
  }

  __device__ __forceinline__ void run() {
    const int group = p.HV / p.H;
    uint32_t head = 0;
    uint32_t tile = 0;
    for_each_chunk(p, at.lane, [&](uint32_t n, int, const Work& work, int c) {
      mbarrier_wait(shared_address(&shared.key_full[0]), n % 2);
      issue_product<Element>(scores, own_keys(), shared_address(shared.k));
#pragma unroll
      for (int i = 0; i < 64; ++i) gradient[i] = 0.0F;
#pragma unroll
      for (int i = 0; i < 32; ++i) pairs[i] = 0.0F;
      wgmma_wait<0>();
      pin(scores);
      for (int h = 0; h < group; ++h, ++head, tile += kTiles) add_head(head, tile);
      add_within_chunk(n);
      store_gradient(work, c);
    });
  }

 private:
  /// This thread's share of the inner product of two tiles of 16 KB.
  __device__ __forceinline__ float inner_product(uint32_t x, uint32_t y) const {
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
  static __device__ __forceinline__ float sum_warp(float x) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
      x += __shfl_xor_sync(0xffffffffU, x, distance);
    }
    return x;
  }
};

template <typename Element>
__global__ void __launch_bounds__(kGradientThreads, 1)
    gated_delta_rule_gradients_kernel(const __grid_constant__ BackwardArguments p) {
  extern __shared__ __align__(1024) uint8_t raw_shared[];
  auto& shared = *reinterpret_cast<GradientShared*>(raw_shared);
  if (threadIdx.x == 0) {
    init_barriers(shared.full, shared.empty, 1, 8);
    init_barriers(shared.key_full, shared.key_empty, 2, 8);
    init_barriers(shared.gate_full, shared.gate_empty, 1, 9);
    init_barriers(shared.sums_full, shared.sums_empty, 8, 1);
    init_barriers(shared.d_p_full, shared.d_p_empty, 4, 4);
    mbarrier_init_fence();
    prefetch_tensor_map(&p.q);
    prefetch_tensor_map(&p.k);
    prefetch_tensor_map(&p.d_o);
    prefetch_tensor_map(&p.d_v);
  }
  // The blocks of dP^T and dG^T on the empty side of the diagonal are never written again.
  static_assert(offsetof(GradientShared, d_g) == offsetof(GradientShared, d_p) + kMatrixBytes);
  auto* zeros = reinterpret_cast<uint4*>(shared.d_p);
  constexpr int kCount = 2 * kMatrixBytes / sizeof(uint4);
  for (int i = threadIdx.x; i < kCount; i += kGradientThreads) zeros[i] = {0, 0, 0, 0};
  fence_async_proxy();
  __syncthreads();
  const int warpgroup = __shfl_sync(0xffffffffU, threadIdx.x / 128, 0);
  const int thread = threadIdx.x % 128;
  if (warpgroup == 0) {
    lower_registers<kGradientLoadRegisters>();
    const int warp = __shfl_sync(0xffffffffU, thread / 32, 0);
    const int lane = thread % 32;
    if (warp == 0) {
      load_gradient_tiles(p, shared, lane);
    } else if (warp == 1) {
      load_gradient_gates(p, shared, lane);
    } else if (warp == 2) {
      store_gate_gradients(p, shared, lane);
    } else {
      load_gradient_keys(p, shared, lane);
    }
  } else if (warpgroup == 1) {
    raise_registers<kGradientRegisters>();
    GradientRole<Element, Role::kQuery>(p, shared, thread).run();
  } else {
    raise_registers<kGradientRegisters>();
    GradientRole<Element, Role::kKey>(p, shared, thread).run();
  }
}

}  // namespace gdn::kernels::cuda::sm90
