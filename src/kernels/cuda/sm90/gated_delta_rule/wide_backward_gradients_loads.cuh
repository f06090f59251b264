// The gradients kernel for wide heads: shared memory and the loading warpgroup, which brings tiles,
// keys and gates in and takes the gates' sums out; and the kernel that makes dg and dbeta of them.
#pragma once

#include <gdn/kernels/cuda/sm90/gated_delta_rule/backward_gradients_loads.cuh>
#include <gdn/kernels/cuda/sm90/gated_delta_rule/wide_backward.cuh>

namespace gdn::kernels::cuda::sm90 {

/// Where things lie in one stage of the ring: a slice of V of one value head, S and dS' for the
/// block's half of K; or, behind a value head's slices, the other half of K and Q.
namespace wide_stage {
inline constexpr int kDO = 0;  // 64 tokens x 64 of V
inline constexpr int kU = kDO + kHalfTileBytes;
inline constexpr int kDV = kU + kWideWritesBytes;
inline constexpr int kS = kDV + kHalfTileBytes;  // 64 of V x 128 of K
inline constexpr int kDS = kS + kWideStateBytes / kWideHalves;
inline constexpr int kBytes = kDS + kWideStateBytes / kWideHalves;
inline constexpr int kOtherK = 0;  // 64 tokens x 128 of K
inline constexpr int kOtherQ = kOtherK + kTileBytes;
}  // namespace wide_stage

struct WideGradientShared {
  static constexpr int kStages = 3;
  alignas(1024) uint8_t q[kTileBytes];  // the block's half of K
  alignas(1024) uint8_t k[kTileBytes];
  alignas(1024) uint8_t stages[kStages][wide_stage::kBytes];
  alignas(1024) uint8_t d_p[kMatrixBytes];  // dP^T
  alignas(1024) uint8_t d_g[kMatrixBytes];  // dG^T
  GateVectors gates[2];
  ChunkSums sums[1];
  alignas(8) uint64_t full[kStages], empty[kStages];
  uint64_t key_full[1], key_empty[1];
  uint64_t gate_full[2], gate_empty[2];
  uint64_t sums_full[1], sums_empty[1];
  uint64_t d_p_full[1], d_p_empty[1];
};

/// Calls body(n, chunk, work, c, half) for every chunk, key head and half of K that is this
/// block's: as for_each_chunk. Neighbouring blocks have the two halves, whose V they share, at
/// about the same time.
template <typename Body>
__device__ __forceinline__ void for_each_wide_chunk(const WideBackwardArguments& p, int lane,
                                                    Body body) {
  const int group = p.HV / p.H;
  uint32_t n = 0;
  for (int item = static_cast<int>(blockIdx.x);; item += static_cast<int>(gridDim.x), ++n) {
    const int chunk = item / (kWideHalves * p.H);
    const int key_head = item / kWideHalves % p.H;
    const Piece piece = find_piece(p, kChunk, chunk, lane);
    if (piece.sequence == p.N) return;
    body(n, chunk, Work(p, piece.sequence, key_head * group), piece.index, item % kWideHalves);
  }
}

/// Columns x to x + 64 kTiles of a chunk of a tensor whose rows have `size`: whole chunks by TMA,
/// whose bytes the caller has announced to `full`; others by plain loads.
template <int kTiles>
__device__ __forceinline__ void load_columns(uint32_t tile, const CUtensorMap* map,
                                             const ConstView4& view, int head, int x, int size,
                                             const Work& work, int c, uint32_t full, int lane) {
  if (work.tokens(c) == kChunk) {
    if (lane != 0) return;
    for (int i = 0; i < kTiles; ++i) {
      tma_load(tile + i * kHalfTileBytes, map, full, x + i * kHalf, head,
               static_cast<int>(work.begin) + c * kChunk, work.batch);
    }
  } else {
    load_ragged_tile<kTiles>(tile, element(view, work, head, int64_t{c} * kChunk) + x,
                             view.stride_t, work.tokens(c), lane, size - x);
  }
}

/// Fills something of `bytes`, of which load() brings what is not in scratch memory, and announces
/// them to `full`.
template <typename Load>
__device__ __forceinline__ void load_announced(uint32_t full, uint32_t bytes,
                                               uint32_t bytes_of_scratch, bool whole, int lane,
                                               Load load) {
  if (whole && lane == 0) mbarrier_arrive_expect(full, bytes);
  load();
  if (whole) return;
  fence_async_proxy();
  __syncwarp();
  if (lane == 0) mbarrier_arrive_expect(full, bytes_of_scratch);
}

__device__ inline void load_wide_gradient_stages(const WideBackwardArguments& p,
                                                 WideGradientShared& shared, int lane) {
  const int group = p.HV / p.H;
  const ConstView4 d_v_view = {p.d_v_view.data, p.d_v_view.stride_b, p.d_v_view.stride_t,
                               p.d_v_view.stride_h};
  uint32_t next = 0;
  // Address and barrier of the next stage, once it is empty.
  const auto take_stage = [&](uint32_t& full) {
    const auto stage = slot(shared.full, next++);
    mbarrier_wait(shared_address(&shared.empty[stage.stage]), stage.parity ^ 1);
    full = shared_address(&shared.full[stage.stage]);
    return shared_address(shared.stages[stage.stage]);
  };
  for_each_wide_chunk(p, lane, [&](uint32_t, int chunk, Work work, int c, int half) {
    const bool whole = work.tokens(c) == kChunk;
    const int other = (1 - half) * kHeadDim;
    uint32_t full;
    for (int h = 0; h < group; ++h, ++work.value_head) {
      for (int slice = 0; slice < p.slices; ++slice) {
        constexpr uint32_t kStateBytesOfHalf = kWideStateBytes / kWideHalves;
        constexpr uint32_t kScratch = kWideWritesBytes + 2 * kStateBytesOfHalf;
        const uint32_t stage = take_stage(full);
        const int x = slice * kSlice;
        load_announced(full, wide_stage::kBytes, kScratch, whole, lane, [&] {
          load_columns<1>(stage + wide_stage::kDO, &p.d_o, p.d_o_view, work.value_head, x, p.V,
                          work, c, full, lane);
          load_columns<1>(stage + wide_stage::kDV, &p.d_v, d_v_view, work.value_head, x, p.V, work,
                          c, full, lane);
        });
        if (lane == 0) {
          const int64_t entry = p.entry(chunk, work.value_head, slice);
          const int64_t state = entry * kWideStateBytes + half * kStateBytesOfHalf;
          bulk_load(stage + wide_stage::kU, p.u + entry * kWideWritesBytes, kWideWritesBytes, full);
          bulk_load(stage + wide_stage::kS, p.s + state, kStateBytesOfHalf, full);
          bulk_load(stage + wide_stage::kDS, p.d_s + state, kStateBytesOfHalf, full);
        }
      }
      const uint32_t keys = take_stage(full);
      load_announced(full, 2 * kTileBytes, 0, whole, lane, [&] {
        load_columns<2>(keys + wide_stage::kOtherK, &p.k, p.k_view, work.key_head, other, p.K, work,
                        c, full, lane);
        load_columns<2>(keys + wide_stage::kOtherQ, &p.q, p.q_view, work.key_head, other, p.K, work,
                        c, full, lane);
      });
    }
  });
}

__device__ inline void load_wide_gradient_keys(const WideBackwardArguments& p,
                                               WideGradientShared& shared, int lane) {
  for_each_wide_chunk(p, lane, [&](uint32_t n, int, const Work& work, int c, int half) {
    const uint32_t full = shared_address(&shared.key_full[0]);
    mbarrier_wait(shared_address(&shared.key_empty[0]), n % 2 ^ 1);
    load_announced(full, 2 * kTileBytes, 0, work.tokens(c) == kChunk, lane, [&] {
      load_columns<2>(shared_address(shared.k), &p.k, p.k_view, work.key_head, half * kHeadDim, p.K,
                      work, c, full, lane);
      load_columns<2>(shared_address(shared.q), &p.q, p.q_view, work.key_head, half * kHeadDim, p.K,
                      work, c, full, lane);
    });
  });
}

__device__ inline void load_wide_gradient_gates(const WideBackwardArguments& p,
                                                WideGradientShared& shared, int lane) {
  const int group = p.HV / p.H;
  uint32_t next = 0;
  for_each_wide_chunk(p, lane, [&](uint32_t, int, Work work, int c, int) {
    for (int h = 0; h < group; ++h, ++work.value_head, ++next) {
      const auto gate = slot(shared.gate_full, next);
      store_gates(fetch_gates(p, work, c, lane), p.scale, shared.gates[gate.stage],
                  shared_address(&shared.gate_empty[gate.stage]), gate.parity ^ 1, lane);
      if (lane == 0) mbarrier_arrive(shared_address(&shared.gate_full[gate.stage]));
    }
  });
}

/// What this block's half of K gives to dg and dbeta, to scratch memory.
__device__ inline void store_wide_gate_sums(const WideBackwardArguments& p,
                                            WideGradientShared& shared, int lane) {
  const int group = p.HV / p.H;
  uint32_t next = 0;
  for_each_wide_chunk(p, lane, [&](uint32_t, int chunk, Work work, int, int half) {
    for (int h = 0; h < group; ++h, ++work.value_head, ++next) {
      const auto gate = slot(shared.gate_full, next);
      const auto stage = slot(shared.sums_full, next);
      mbarrier_wait(shared_address(&shared.gate_full[gate.stage]), gate.parity);
      mbarrier_wait(shared_address(&shared.sums_full[stage.stage]), stage.parity);
      const TokenSums sums = add_up(shared.sums[stage.stage], shared.gates[gate.stage], lane);
      __syncwarp();
      if (lane == 0) {
        mbarrier_arrive(shared_address(&shared.gate_empty[gate.stage]));
        mbarrier_arrive(shared_address(&shared.sums_empty[stage.stage]));
      }
      WideGateSums& out = p.gate_sums[p.entry(chunk, work.value_head) * kWideHalves + half];
      out.read[lane] = sums.read;
      out.written[lane] = sums.written;
      if (half == 0) {
        out.row[lane] = sums.row;
        out.column[lane] = sums.column;
        out.diagonal[lane] = sums.diagonal;
      }
      if (lane == 0) out.through = sums.through;
    }
  });
}

inline constexpr int kWideGatesWarps = 4;

/// dg and dbeta from the sums of both halves of K: one warp a chunk and value head.
static __global__ void __launch_bounds__(32 * kWideGatesWarps)
    gated_delta_rule_wide_gates_kernel(const __grid_constant__ WideBackwardArguments p) {
  const int lane = threadIdx.x % 32;
  const int entry = static_cast<int>(blockIdx.x * kWideGatesWarps + threadIdx.x / 32);
  const Piece piece = find_piece(p, kChunk, entry / p.HV, lane);
  if (piece.sequence == p.N) return;
  const Work work(p, piece.sequence, entry % p.HV);
  const auto add = [](float2 x, float2 y) { return float2{x.x + y.x, x.y + y.y}; };
  const WideGateSums* halves = p.gate_sums + int64_t{entry} * kWideHalves;
  const TokenSums sums = {add(halves[0].read[lane], halves[1].read[lane]),
                          add(halves[0].written[lane], halves[1].written[lane]),
                          halves[0].row[lane],
                          halves[0].column[lane],
                          halves[0].diagonal[lane],
                          halves[0].through + halves[1].through};
  store_gate_gradients(p, p.d_g, p.d_beta, work, piece.index, sums,
                       fetch_gates(p, work, piece.index, lane).beta, lane);
}

}  // namespace gdn::kernels::cuda::sm90
