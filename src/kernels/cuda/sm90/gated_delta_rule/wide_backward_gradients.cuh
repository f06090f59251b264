// The gradients of wide heads that need no scan. backward_gradients.cuh has the derivation; what
// differs:
// - A block has one half of K, 128 columns of dQ and dK; both halves make dP and dG, from all of V
//   and, for Q K^T and K K^T, all of K.
// - V comes in slices of 64. All products of a value head are summed over them in accumulators and
//   scaled once: dO U^T, dO S^T in the query role; dV U^T, dV S^T, U dS'^T in the key role.
// - Then no registers are left to gather dQ, dK, dP, dG of several value heads of a key head. These
//   wait in scratch memory, where each thread finds its own again.
// - A half has only its part of the sums over K that dg and dbeta need: a small kernel adds them.
#pragma once

#include <gdn/kernels/cuda/sm90/gated_delta_rule/backward_gradients_parts.cuh>
#include <gdn/kernels/cuda/sm90/gated_delta_rule/wide_backward_gradients_loads.cuh>

namespace gdn::kernels::cuda::sm90 {

/// Floats a block needs in group_sums: of both roles, 64 + 32 registers of 128 threads.
inline constexpr int64_t kWideRoleSums = (64 + 32) * 128;
inline constexpr int64_t kWideGroupSums = 2 * kWideRoleSums;

template <typename Element, Role kRole>
struct WideGradientRole {
  static constexpr bool kQuery = kRole == Role::kQuery;

  const WideBackwardArguments& p;
  WideGradientShared& shared;
  Fragment at;
  int thread;
  uint32_t next_stage = 0;
  float gradient[64];  // dQ, dK
  float pairs[32];     // dP, dG

  __device__ __forceinline__ WideGradientRole(const WideBackwardArguments& p,
                                              WideGradientShared& shared, int thread)
      : p(p), shared(shared), at(thread), thread(thread) {}

  /// Address of the next stage, once it is full.
  __device__ __forceinline__ uint32_t wait_stage() const {
    const auto stage = slot(shared.full, next_stage);
    mbarrier_wait(shared_address(&shared.full[stage.stage]), stage.parity);
    return shared_address(shared.stages[stage.stage]);
  }
  __device__ __forceinline__ void release_stage() {
    release(shared.empty[slot(shared.full, next_stage).stage], at.lane);
    ++next_stage;
  }
  __device__ __forceinline__ uint32_t own_keys() const {
    return shared_address(kQuery ? shared.q : shared.k);
  }

  /// scores (+)= left right^T, both [64 tokens, 128]: Q K^T or K K^T.
  __device__ __forceinline__ void multiply_keys(float (&scores)[32], uint32_t left, uint32_t right,
                                                bool add) const {
#pragma unroll
    for (int s = 0; s < kHeadDim / 16; ++s) {
      const uint32_t offset = (s / 4) * kHalfTileBytes + (s % 4) * 32;
      wgmma<Element, 64>(scores, advance(swizzled_tile(left), offset),
                         advance(swizzled_tile(right), offset), add || s > 0);
    }
  }

  /// product (+)= left [64 tokens, 64 of V] states, states 64 of V x 128 of K of S^T or dS'^T.
  __device__ __forceinline__ void multiply_states(float (&product)[64], uint32_t left,
                                                  uint32_t states, bool add) const {
#pragma unroll
    for (int s = 0; s < kSlice / 16; ++s) {
      wgmma<Element, 128, Major::kOuter>(
          product, advance(swizzled_tile(left), s * 32),
          advance(swizzled_tile(states, kHalfTileBytes), s * 16 * 128), add || s > 0);
    }
  }

  /// From both halves of K, the other one's by way of the ring.
  __device__ __forceinline__ void find_scores(float (&scores)[32]) {
    const uint32_t other = wait_stage();
    const uint32_t other_k = other + wide_stage::kOtherK;
    pin(scores);
    wgmma_fence();
    multiply_keys(scores, own_keys(), shared_address(shared.k), false);
    multiply_keys(scores, kQuery ? other + wide_stage::kOtherQ : other_k, other_k, true);
    wgmma_commit();
    wgmma_wait<0>();
    pin(scores);
    release_stage();
  }

  /// dQ or dK, dP or dG of one value head, and its sums.
  __device__ __forceinline__ void find_head(uint32_t head) {
    // In the registers of what is made of them: dO U^^T or dV U^^T, and dO S^T or dV S^T.
    float(&pair_product)[32] = pairs;
    float(&product)[64] = gradient;
    float written_product[kQuery ? 1 : 64];  // U^ dS'^T
    float through = 0;
    for (int slice = 0; slice < p.slices; ++slice) {
      const uint32_t stage = wait_stage();
      const uint32_t left = stage + (kQuery ? wide_stage::kDO : wide_stage::kDV);
      const uint32_t u = stage + wide_stage::kU;
      const bool add = slice > 0;
      pin(pair_product);
      pin(product);
      pin(written_product);
      wgmma_fence();
#pragma unroll
      for (int s = 0; s < kSlice / 16; ++s) {
        wgmma<Element, 64>(pair_product, advance(swizzled_tile(left), s * 32),
                           advance(swizzled_tile(u), s * 32), add || s > 0);
      }
      multiply_states(product, left, stage + wide_stage::kS, add);
      if constexpr (!kQuery) multiply_states(written_product, u, stage + wide_stage::kDS, add);
      wgmma_commit();
      if constexpr (kQuery) {
        through += inner_product<Element>(stage + wide_stage::kS, stage + wide_stage::kDS, thread);
      }
      wgmma_wait<0>();
      pin(pair_product);
      pin(product);
      pin(written_product);
      release_stage();
    }

    const auto gate = slot(shared.gate_full, head);
    const auto stage = slot(shared.sums_full, head);
    const GateVectors& gates = shared.gates[gate.stage];
    ChunkSums& sums = shared.sums[stage.stage];
    const int rows[2] = {16 * at.warp + at.row, 16 * at.warp + at.row + 8};
    mbarrier_wait(shared_address(&shared.gate_full[gate.stage]), gate.parity);
    mbarrier_wait(shared_address(&shared.sums_empty[stage.stage]), stage.parity ^ 1);
    if constexpr (kQuery) {
      const float factor[2] = {gates.from_start_scaled[rows[0]], gates.from_start_scaled[rows[1]]};
      add_product<Element, Result::kStored>(gradient, product, own_keys(), factor, factor,
                                            sums.read[0], at);
      sums.through[at.warp] = sum_warp(through);
    } else {
      const float factor[2] = {-gates.from_start[rows[0]], -gates.from_start[rows[1]]};
      add_product<Element, Result::kStored>(gradient, product, own_keys(), factor, factor,
                                            sums.read[1], at);
      const float to_end[2] = {gates.to_end[rows[0]], gates.to_end[rows[1]]};
      const float written[2] = {gates.written[rows[0]], gates.written[rows[1]]};
      add_product<Element>(gradient, written_product, own_keys(), written, to_end, sums.written,
                           at);
    }
    // Only now are there registers for them.
    float scores[32];
    find_scores(scores);
    add_pairs<kRole, Result::kStored>(pairs, pair_product, scores, gates, p.scale, sums, at);
    release(shared.gate_empty[gate.stage], at.lane);
    release(shared.sums_full[stage.stage], at.lane);
  }

  /// Adds what this thread left for the value heads before, and leaves the sum for the next.
  __device__ __forceinline__ void gather(bool first, bool last) {
    float* left =
        p.group_sums + blockIdx.x * kWideGroupSums + (kQuery ? 0 : kWideRoleSums) + thread;
    if (!first) {
#pragma unroll
      for (int i = 0; i < 64; ++i) gradient[i] += left[i * 128];
#pragma unroll
      for (int i = 0; i < 32; ++i) pairs[i] += left[(64 + i) * 128];
    }
    if (!last) {
#pragma unroll
      for (int i = 0; i < 64; ++i) left[i * 128] = gradient[i];
#pragma unroll
      for (int i = 0; i < 32; ++i) left[(64 + i) * 128] = pairs[i];
    }
  }

  __device__ __forceinline__ void run() {
    const int group = p.HV / p.H;
    uint32_t head = 0;
    for_each_wide_chunk(p, at.lane, [&](uint32_t n, int, const Work& work, int c, int half) {
      mbarrier_wait(shared_address(&shared.key_full[0]), n % 2);
      for (int h = 0; h < group; ++h, ++head) {
        find_head(head);
        if (group > 1) gather(h == 0, h + 1 == group);
      }
      add_within_chunk<Element, kRole>(gradient, pairs, shared, n, at);
      store_gradient<Element>(gradient, kQuery ? p.d_q : p.d_k, work, c, at, half * kHeadDim, p.K);
    });
  }
};

template <typename Element>
__global__ void __launch_bounds__(kGradientThreads, 1)
    gated_delta_rule_wide_gradients_kernel(const __grid_constant__ WideBackwardArguments p) {
  extern __shared__ __align__(1024) uint8_t raw_shared[];
  auto& shared = *reinterpret_cast<WideGradientShared*>(raw_shared);
  if (threadIdx.x == 0) {
    init_barriers(shared.full, shared.empty, 1, 8);
    init_barriers(shared.key_full, shared.key_empty, 1, 8);
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
  static_assert(offsetof(WideGradientShared, d_g) ==
                offsetof(WideGradientShared, d_p) + kMatrixBytes);
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
      load_wide_gradient_stages(p, shared, lane);
    } else if (warp == 1) {
      load_wide_gradient_gates(p, shared, lane);
    } else if (warp == 2) {
      store_wide_gate_sums(p, shared, lane);
    } else {
      load_wide_gradient_keys(p, shared, lane);
    }
  } else if (warpgroup == 1) {
    raise_registers<kGradientRegisters>();
    WideGradientRole<Element, Role::kQuery>(p, shared, thread).run();
  } else {
    raise_registers<kGradientRegisters>();
    WideGradientRole<Element, Role::kKey>(p, shared, thread).run();
  }
}

}  // namespace gdn::kernels::cuda::sm90
