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

/// Numbers of one value head's tiles; of S and dS' that of the first.
struct HeadTiles {
  uint32_t d_o, u, d_v, states;
};

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
  float on_diagonal[2];
  GradientRing ring;
  uint32_t next_tile = 0;
  uint32_t next_head = 0;  // of a part: gates and sums
  uint32_t kept = 0;       // the first of the tiles that the next part uses too

  __device__ __forceinline__ GradientRole(const BackwardArguments& p, GradientShared& shared,
                                          int thread)
      : p(p), shared(shared), at(thread), thread(thread) {}

  /// Address of tile n, once it is there.
  __device__ __forceinline__ uint32_t wait_tile(uint32_t n) const {
    const auto stage = slot(shared.full, n);
    mbarrier_wait(shared_address(&shared.full[stage.stage]), stage.parity);
    return shared_address(shared.tiles[ring.tile(n)]);
  }
  __device__ __forceinline__ void release_tile(uint32_t n) const {
    release(shared.empty[slot(shared.full, n).stage], at.lane);
  }
  __device__ __forceinline__ uint32_t q() const { return shared_address(shared.tiles[ring.q]); }
  __device__ __forceinline__ uint32_t k() const { return shared_address(shared.tiles[ring.k]); }
  __device__ __forceinline__ uint32_t own_keys() const { return kQuery ? q() : k(); }

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

  /// Of the pair's second chunk with the first one, whose K is tile `next`: the gradient begins
  /// with dP K or dG K; dP^T and dG^T wait in shared memory for the first chunk's dK.
  __device__ __forceinline__ void begin_across(uint32_t parity) {
    const uint32_t first_keys = next_tile++;
    const uint32_t first_k = wait_tile(first_keys);
    issue_product<Element>(scores, own_keys(), first_k);
#pragma unroll
    for (int i = 0; i < 32; ++i) pairs[i] = 0.0F;
    wgmma_wait<0>();
    pin(scores);
    const int group = p.HV / p.H;
    for (int h = 0; h < group; ++h, ++next_head) {
      kept = next_tile;
      add_head_across(h + 1 == group);
      next_tile += kTilesAcross;
    }

    uint32_t operand[4][4];
    to_operand<Element>(pairs, operand);
    mbarrier_wait(shared_address(&shared.across_empty[0]), parity ^ 1);
    const uint32_t own = shared_address(kQuery ? shared.d_p_across : shared.d_g_across);
#pragma unroll
    for (int block = 0; block < 4; ++block) {
      store_matrices_transposed(token_row(own, block, at.warp, at.lane), operand[block][0],
                                operand[block][1], operand[block][2], operand[block][3]);
    }
    const uint64_t k_columns = swizzled_tile(first_k, kHalfTileBytes);
    pin(gradient);
    wgmma_fence();
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      wgmma<Element, 128, Major::kOuter>(gradient, operand[j], advance(k_columns, j * 16 * 128), 1);
    }
    wgmma_commit();
    fence_async_proxy();
    release(shared.across_full[0], at.lane);
    wgmma_wait<0>();
    pin(gradient);
    pin(operand);
    release_tile(first_keys);
  }

  /// One value head of that; `keep`: dO and dV are not done with.
  __device__ __forceinline__ void add_head_across(bool keep) {
    const auto gate = slot(shared.gate_full, next_head);
    const auto stage = slot(shared.sums_full, next_head);
    mbarrier_wait(shared_address(&shared.gate_full[gate.stage]), gate.parity);
    mbarrier_wait(shared_address(&shared.sums_empty[stage.stage]), stage.parity ^ 1);
    const uint32_t d_o = wait_tile(next_tile + kTileDO);
    const uint32_t u = wait_tile(next_tile + kTileU);
    const uint32_t d_v = wait_tile(next_tile + kTileDV);
    float product[32];
    issue_product<Element>(product, kQuery ? d_o : d_v, u);
    wgmma_wait<0>();
    pin(product);
    release_tile(next_tile + kTileU);
    if (!keep) {
      release_tile(next_tile + kTileDO);
      release_tile(next_tile + kTileDV);
    }
    add_pairs_across<kRole>(pairs, product, scores, shared.gates[gate.stage],
                            shared.sums[stage.stage], at);
    release(shared.gate_empty[gate.stage], at.lane);
    release(shared.sums_full[stage.stage], at.lane);
  }

  /// The first chunk's dK += dP^T Q + dG^T K of the second's Q and K, the next two tiles.
  __device__ __forceinline__ void end_across(uint32_t parity) {
    const uint32_t second_q = wait_tile(next_tile);
    const uint32_t second_k = wait_tile(next_tile + 1);
    if constexpr (!kQuery) {
      mbarrier_wait(shared_address(&shared.across_full[0]), parity);
      const uint64_t d_p = swizzled_tile(shared_address(shared.d_p_across));
      const uint64_t d_g = swizzled_tile(shared_address(shared.d_g_across));
      pin(gradient);
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        wgmma<Element, 128, Major::kOuter>(
            gradient, advance(d_p, i * 32),
            advance(swizzled_tile(second_q, kHalfTileBytes), i * 16 * 128), 1);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        wgmma<Element, 128, Major::kOuter>(
            gradient, advance(d_g, i * 32),
            advance(swizzled_tile(second_k, kHalfTileBytes), i * 16 * 128), 1);
      }
      wgmma_commit();
      wgmma_wait<0>();
      pin(gradient);
      release(shared.across_empty[0], at.lane);
    }
    release_tile(next_tile++);
    release_tile(next_tile++);
  }

  /// One value head of a chunk by itself; `through`: <S, dS'> is wanted; `keep`: S and dS' are not
  /// done with.
  __device__ __forceinline__ void add_head(const HeadTiles& tiles, bool through, bool keep) {
    const uint32_t head = next_head;
    const uint32_t states = tiles.states;
    const auto gate = slot(shared.gate_full, head);
    const auto stage = slot(shared.sums_full, head);
    const GateVectors& gates = shared.gates[gate.stage];
    ChunkSums& sums = shared.sums[stage.stage];
    const int rows[2] = {16 * at.warp + at.row, 16 * at.warp + at.row + 8};
    mbarrier_wait(shared_address(&shared.gate_full[gate.stage]), gate.parity);
    mbarrier_wait(shared_address(&shared.sums_empty[stage.stage]), stage.parity ^ 1);
    const uint32_t d_o = wait_tile(tiles.d_o);
    const uint32_t u = wait_tile(tiles.u);
    if constexpr (!kQuery) release_tile(tiles.d_o);
    const uint32_t d_v = wait_tile(tiles.d_v);
    const uint32_t left = kQuery ? d_o : d_v;
    {
      float product[32];
      issue_product<Element>(product, left, u);
      wgmma_wait<0>();
      pin(product);
      if constexpr (kQuery) {
        release_tile(tiles.u);
        release_tile(tiles.d_v);
      }
      add_pairs<kRole>(pairs, product, scores, on_diagonal, gates, p.scale, sums, at);
    }
    float product[64];
    if constexpr (kQuery) {
      const uint32_t s_0 = wait_tile(states);
      const uint32_t s_1 = wait_tile(states + 1);
      multiply_by_states(product, d_o, s_0, s_1);
      release_tile(tiles.d_o);
      const float factor[2] = {gates.from_start_scaled[rows[0]], gates.from_start_scaled[rows[1]]};
      add_product<Element>(gradient, product, own_keys(), factor, factor, sums.read[0], at);
      const uint32_t d_s_0 = wait_tile(states + 2);
      const uint32_t d_s_1 = wait_tile(states + 3);
      if (through) {
        const float sum =
            inner_product<Element>(s_0, d_s_0, thread) + inner_product<Element>(s_1, d_s_1, thread);
        sums.through[at.warp] = sum_warp(sum);
      }
      for (int i = 0; !keep && i < 4; ++i) release_tile(states + i);
    } else {
      // dV S^T, then U dS'^T: one piece of code, which the multiprocessor has to fetch.
#pragma unroll 1
      for (int i = 0; i < 2; ++i) {
        const bool reads = i == 0;
        const uint32_t tile = states + 2 * i;
        const uint32_t tile_0 = wait_tile(tile);
        const uint32_t tile_1 = wait_tile(tile + 1);
        multiply_by_states(product, reads ? d_v : u, tile_0, tile_1);
        release_tile(reads ? tiles.d_v : tiles.u);
        if (!keep) {
          release_tile(tile);
          release_tile(tile + 1);
        }
        float factor[2];
        float dot_factor[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          factor[r] = reads ? -gates.from_start[rows[r]] : gates.written[rows[r]];
          dot_factor[r] = reads ? factor[r] : gates.to_end[rows[r]];
        }
        add_product<Element>(gradient, product, own_keys(), factor, dot_factor,
                             reads ? sums.read[1] : sums.written, at);
      }
    }
    release(shared.gate_empty[gate.stage], at.lane);
    release(shared.sums_full[stage.stage], at.lane);
  }

  __device__ __forceinline__ void run() {
    uint32_t crossed = 0;  // pairs of two chunks
    clear_gradient();
    for (uint32_t chunk = 0;; ++chunk) {
      wait_tile(next_tile);
      const GradientItem& item = shared.items[chunk % 2];
      const int c = uniform(item.c);
      const bool both = uniform(item.both);
      if (c < 0) return;
      take_keys();
      const bool second = c % 2 == 1;
      if (second) begin_across(crossed % 2);
      issue_product<Element>(scores, own_keys(), k());
#pragma unroll
      for (int i = 0; i < 32; ++i) pairs[i] = 0.0F;
      wgmma_wait<0>();
      pin(scores);
      if constexpr (kQuery) find_diagonal(scores, on_diagonal, at);
      keep_below_diagonal(scores, at);
      const int group = p.HV / p.H;
      for (int h = 0; h < group; ++h, ++next_head) {
        const bool begins = both && h == 0;  // with what the part before has kept
        HeadTiles tiles = {next_tile + kTileDO, next_tile + kTileU, next_tile + kTileDV,
                           next_tile + kTileS};
        uint32_t count = kTiles;
        if (begins && second) {
          tiles = {kept + kTileDO, next_tile, kept + kTileDV, next_tile + 1};
          count = kTiles - 2;
        } else if (begins) {
          tiles.states = kept;
          count = kTilesAcross;
        }
        add_head(tiles, second || !both, second && h + 1 == group);
        kept = tiles.states;
        next_tile += count;
      }
      if (both && !second) end_across(crossed++ % 2);
      add_within_chunk<Element, kRole>(gradient, pairs, shared, q(), k(), chunk, at);
      store_gradient<Element>(gradient, kQuery ? p.d_q : p.d_k, item.work, c, at);
      clear_gradient();
    }
  }

 private:
  /// x, which the compiler then knows to be the same in every lane.
  static __device__ __forceinline__ int uniform(int x) { return __shfl_sync(0xffffffffU, x, 0); }

  /// From the next two tiles; those of the chunk before are done with.
  __device__ __forceinline__ void take_keys() {
    ring.exchange(next_tile, ring.q);
    release_tile(next_tile++);
    wait_tile(next_tile);
    ring.exchange(next_tile, ring.k);
    release_tile(next_tile++);
  }

  __device__ __forceinline__ void clear_gradient() {
#pragma unroll
    for (int i = 0; i < 64; ++i) gradient[i] = 0.0F;
  }
};

template <typename Element>
__global__ void __launch_bounds__(kGradientThreads, 1)
    gated_delta_rule_gradients_kernel(const __grid_constant__ BackwardArguments p) {
  extern __shared__ __align__(1024) uint8_t raw_shared[];
  auto& shared = *reinterpret_cast<GradientShared*>(raw_shared);
  if (threadIdx.x == 0) {
    init_barriers(shared.full, shared.empty, 1, 8);
    init_barriers(shared.gate_full, shared.gate_empty, 1, 9);
    init_barriers(shared.sums_full, shared.sums_empty, 8, 1);
    init_barriers(shared.d_p_full, shared.d_p_empty, 4, 4);
    init_barriers(shared.across_full, shared.across_empty, 8, 4);
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
