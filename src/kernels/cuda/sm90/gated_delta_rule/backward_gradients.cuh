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

#include <gdn/kernels/cuda/sm90/gated_delta_rule/backward_gradients_parts.cuh>

namespace gdn::kernels::cuda::sm90 {

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

  /// Address of tile n, once it is there.
  __device__ __forceinline__ uint32_t wait_tile(uint32_t n) const {
    const auto stage = slot(shared.full, n);
    mbarrier_wait(shared_address(&shared.full[stage.stage]), stage.parity);
    return shared_address(shared.tiles[stage.stage]);
  }
  __device__ __forceinline__ void release_tile(uint32_t n) const {
    release(shared.empty[slot(shared.full, n).stage], at.lane);
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
      add_pairs<kRole>(pairs, product, scores, gates, p.scale, sums, at);
    }
    float product[64];
    const uint32_t s_0 = wait_tile(first + kTileS);
    const uint32_t s_1 = wait_tile(first + kTileS + 1);
    multiply_by_states(product, left, s_0, s_1);
    release_tile(first + (kQuery ? kTileDO : kTileDV));
    if constexpr (kQuery) {
      const float factor[2] = {gates.from_start_scaled[rows[0]], gates.from_start_scaled[rows[1]]};
      add_product<Element>(gradient, product, own_keys(), factor, factor, sums.read[0], at);
      const uint32_t d_s_0 = wait_tile(first + kTileDS);
      const uint32_t d_s_1 = wait_tile(first + kTileDS + 1);
      const float sum =
          inner_product<Element>(s_0, d_s_0, thread) + inner_product<Element>(s_1, d_s_1, thread);
      sums.through[at.warp] = sum_warp(sum);
      release_tile(first + kTileS);
      release_tile(first + kTileS + 1);
    } else {
      release_tile(first + kTileS);
      release_tile(first + kTileS + 1);
      const float factor[2] = {-gates.from_start[rows[0]], -gates.from_start[rows[1]]};
      add_product<Element>(gradient, product, own_keys(), factor, factor, sums.read[1], at);
      const uint32_t d_s_0 = wait_tile(first + kTileDS);
      const uint32_t d_s_1 = wait_tile(first + kTileDS + 1);
      multiply_by_states(product, u, d_s_0, d_s_1);
      release_tile(first + kTileU);
      const float to_end[2] = {gates.to_end[rows[0]], gates.to_end[rows[1]]};
      const float written[2] = {gates.written[rows[0]], gates.written[rows[1]]};
      add_product<Element>(gradient, product, own_keys(), written, to_end, sums.written, at);
    }
    release_tile(first + kTileDS);
    release_tile(first + kTileDS + 1);
    release(shared.gate_empty[gate.stage], at.lane);
    release(shared.sums_full[stage.stage], at.lane);
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
      add_within_chunk<Element, kRole>(gradient, pairs, shared, n, at);
      store_gradient<Element>(gradient, kQuery ? p.d_q : p.d_k, work, c, at);
    });
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
