// The gradients kernel's shared memory and its loading warpgroup: tiles, keys and gates in, dg and
// dbeta out. backward_gradients.cuh has the derivation and the roles that compute.
#pragma once

#include <gdn/kernels/cuda/sm90/gated_delta_rule/backward.cuh>
#include <gdn/kernels/cuda/sm90/gated_delta_rule/loads.cuh>

namespace gdn::kernels::cuda::sm90 {

inline constexpr int kGradientThreads = 384;
inline constexpr int kGradientLoadRegisters = 40;
inline constexpr int kGradientRegisters = 232;
inline constexpr int kKeyRoleBarrier = 1;

/// A value head's tiles of 16 KB, in the order in which they are loaded and used.
enum Tile : uint32_t {
  kTileDO,
  kTileU,
  kTileDV,
  kTileS,
  kTileDS = kTileS + 2,
  kTiles = kTileDS + 2
};

/// The two working warpgroups: what dO and Q give, and what dV, U and K give.
enum class Role { kQuery, kKey };

/// Sums over the rows of one chunk of one value head, from both roles.
struct ChunkSums {
  float read[2][kChunk];       // r
  float written[kChunk];       // w
  float row[2][kChunk];        // sum_{j < i} beta_j Y_ij
  float column[2][4][kChunk];  // sum_{i > j} Y_ij, by warp
  float diagonal[kChunk];      // Y_jj
  float through[4];            // <S, dS'>, by warp
};

struct GradientShared {
  static constexpr int kStages = 10;
  static constexpr int kGradientGateStages = 3;
  alignas(1024) uint8_t q[kTileBytes];
  alignas(1024) uint8_t k[kTileBytes];
  alignas(1024) uint8_t tiles[kStages][kTileBytes];
  alignas(1024) uint8_t d_p[kMatrixBytes];  // dP^T
  alignas(1024) uint8_t d_g[kMatrixBytes];  // dG^T
  GateVectors gates[kGradientGateStages];
  ChunkSums sums[2];
  alignas(8) uint64_t full[kStages], empty[kStages];
  uint64_t key_full[1], key_empty[1];
  uint64_t gate_full[kGradientGateStages], gate_empty[kGradientGateStages];
  uint64_t sums_full[2], sums_empty[2];
  uint64_t d_p_full[1], d_p_empty[1];
};

/// Calls body(n, chunk, work) for every chunk and key head that is this block's: n counts them,
/// `chunk` is counted over all sequences, `work` is its sequence and the key head's first value
/// head, `c` the chunk's number in it.
template <typename Body>
__device__ __forceinline__ void for_each_chunk(const BackwardArguments& p, int lane, Body body) {
  uint32_t n = 0;
  for (int item = static_cast<int>(blockIdx.x);; item += static_cast<int>(gridDim.x), ++n) {
    const int chunk = item / p.H;
    const Piece piece = find_piece(p, kChunk, chunk, lane);
    if (piece.sequence == p.N) return;
    const int group = p.HV / p.H;
    body(n, chunk, Work(p, piece.sequence, item % p.H * group), piece.index);
  }
}

__device__ inline void load_gradient_tiles(const BackwardArguments& p, GradientShared& shared,
                                           int lane) {
  const int group = p.HV / p.H;
  uint32_t next = 0;
  for_each_chunk(p, lane, [&](uint32_t, int chunk, Work work, int c) {
    for (int h = 0; h < group; ++h, ++work.value_head) {
      const int64_t entry = p.entry(chunk, work.value_head);
      for (uint32_t tile = 0; tile < kTiles; ++tile, ++next) {
        const auto stage = slot(shared.full, next);
        const uint32_t full = shared_address(&shared.full[stage.stage]);
        const uint32_t address = shared_address(shared.tiles[stage.stage]);
        mbarrier_wait(shared_address(&shared.empty[stage.stage]), stage.parity ^ 1);
        if (tile == kTileDO || tile == kTileDV) {
          const bool d_o = tile == kTileDO;
          const ConstView4 view = d_o ? p.d_o_view
                                      : ConstView4{p.d_v_view.data, p.d_v_view.stride_b,
                                                   p.d_v_view.stride_t, p.d_v_view.stride_h};
          load_tile(address, d_o ? &p.d_o : &p.d_v,
                    element(view, work, work.value_head, int64_t{c} * kChunk), view.stride_t,
                    work.value_head, work, c, full, lane);
        } else if (lane == 0) {
          const uint8_t* source = tile == kTileU ? p.u + entry * kWritesBytes
                                  : tile < kTileDS
                                      ? p.s + entry * kStateBytes + (tile - kTileS) * kTileBytes
                                      : p.d_s + entry * kStateBytes + (tile - kTileDS) * kTileBytes;
          mbarrier_arrive_expect(full, kTileBytes);
          bulk_load(address, source, kTileBytes, full);
        }
      }
    }
  });
}

__device__ inline void load_gradient_keys(const BackwardArguments& p, GradientShared& shared,
                                          int lane) {
  for_each_chunk(p, lane, [&](uint32_t n, int, const Work& work, int c) {
    const uint32_t full = shared_address(&shared.key_full[0]);
    const int64_t token = int64_t{c} * kChunk;
    mbarrier_wait(shared_address(&shared.key_empty[0]), n % 2 ^ 1);
    load_tile(shared_address(shared.k), &p.k, element(p.k_view, work, work.key_head, token),
              p.k_view.stride_t, work.key_head, work, c, full, lane);
    load_tile(shared_address(shared.q), &p.q, element(p.q_view, work, work.key_head, token),
              p.q_view.stride_t, work.key_head, work, c, full, lane);
  });
}

__device__ inline void load_gradient_gates(const BackwardArguments& p, GradientShared& shared,
                                           int lane) {
  const int group = p.HV / p.H;
  uint32_t next = 0;
  for_each_chunk(p, lane, [&](uint32_t, int, Work work, int c) {
    for (int h = 0; h < group; ++h, ++work.value_head, ++next) {
      const auto gate = slot(shared.gate_full, next);
      store_gates(fetch_gates(p, work, c, lane), p.scale, shared.gates[gate.stage],
                  shared_address(&shared.gate_empty[gate.stage]), gate.parity ^ 1, lane);
      if (lane == 0) mbarrier_arrive(shared_address(&shared.gate_full[gate.stage]));
    }
  });
}

/// One lane's part of a chunk's sums (ChunkSums), complete: tokens 2 l and 2 l + 1.
struct TokenSums {
  float2 read, written, row, column, diagonal;
  float through;  // times the chunk's decay
};

/// dg and dbeta of chunk c from the sums.
__device__ __forceinline__ void store_gate_gradients(const ProblemArguments& p, float* d_g_out,
                                                     float* d_beta_out, const Work& work, int c,
                                                     const TokenSums& sums, float2 beta, int lane) {
  constexpr uint32_t kWarp = 0xffffffffU;
  const float2 d_beta = {sums.column.x + sums.written.x + sums.diagonal.x,
                         sums.column.y + sums.written.y + sums.diagonal.y};
  // What begins to cross at the next token, less what no longer does.
  const float2 step = {beta.x * (sums.written.x + sums.column.x) - sums.row.x,
                       beta.y * (sums.written.y + sums.column.y) - sums.row.y};
  float before = step.x + step.y;           // sum over the lanes up to this one, then below it
  float after = sums.read.x + sums.read.y;  // sum over the lanes from this one on
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const float below = __shfl_up_sync(kWarp, before, distance);
    const float above = __shfl_down_sync(kWarp, after, distance);
    if (lane >= distance) before += below;
    if (lane + distance < 32) after += above;
  }
  before = __shfl_up_sync(kWarp, before, 1);
  if (lane == 0) before = 0;
  const float above = __shfl_down_sync(kWarp, after, 1);
  const float beyond = lane == 31 ? 0.0F : above;
  const float2 d_g = {sums.through + before + after,
                      sums.through + before + step.x + sums.read.y + beyond};
  const int64_t first = (work.batch * p.T + work.begin) * p.all_heads + work.value_head;
  const int64_t token = int64_t{c} * kChunk + 2 * lane;
  if (token < work.length) {
    d_g_out[first + token * p.all_heads] = d_g.x;
    d_beta_out[first + token * p.all_heads] = d_beta.x;
  }
  if (token + 1 < work.length) {
    d_g_out[first + (token + 1) * p.all_heads] = d_g.y;
    d_beta_out[first + (token + 1) * p.all_heads] = d_beta.y;
  }
}

/// One lane's part of the sums of both roles and all warps.
__device__ __forceinline__ TokenSums add_up(const ChunkSums& sums, const GateVectors& gates,
                                            int lane) {
  const auto pair = [&](const float* vector) {
    return reinterpret_cast<const float2*>(vector)[lane];
  };
  const auto both = [&](const float(&vectors)[2][kChunk]) {
    const float2 x = pair(vectors[0]);
    const float2 y = pair(vectors[1]);
    return float2{x.x + y.x, x.y + y.y};
  };
  float2 column = {0, 0};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float2 part = pair(sums.column[i / 4][i % 4]);
    column.x += part.x;
    column.y += part.y;
  }
  const float through = gates.from_start[kChunk - 1] *
                        (sums.through[0] + sums.through[1] + sums.through[2] + sums.through[3]);
  return {both(sums.read), pair(sums.written),  both(sums.row),
          column,          pair(sums.diagonal), through};
}

/// dg and dbeta of every chunk; lane l has tokens 2 l and 2 l + 1.
__device__ inline void store_gate_gradients(const BackwardArguments& p, GradientShared& shared,
                                            int lane) {
  const int group = p.HV / p.H;
  uint32_t next = 0;
  for_each_chunk(p, lane, [&](uint32_t, int, Work work, int c) {
    for (int h = 0; h < group; ++h, ++work.value_head, ++next) {
      const auto gate = slot(shared.gate_full, next);
      const auto stage = slot(shared.sums_full, next);
      const GateVectors& gates = shared.gates[gate.stage];
      mbarrier_wait(shared_address(&shared.gate_full[gate.stage]), gate.parity);
      mbarrier_wait(shared_address(&shared.sums_full[stage.stage]), stage.parity);
      const float2 beta = reinterpret_cast<const float2*>(gates.beta)[lane];
      const TokenSums sums = add_up(shared.sums[stage.stage], gates, lane);
      __syncwarp();
      if (lane == 0) {
        mbarrier_arrive(shared_address(&shared.gate_empty[gate.stage]));
        mbarrier_arrive(shared_address(&shared.sums_empty[stage.stage]));
      }
      store_gate_gradients(p, p.d_g, p.d_beta, work, c, sums, beta, lane);
    }
  });
}

}  // namespace gdn::kernels::cuda::sm90
