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
  kTilesAcross,  // what lies between the chunks needs no more
  kTileS = kTilesAcross,
  kTileDS = kTileS + 2,
  kTiles = kTileDS + 2
};

/// A pair of chunks in parts, in order: the second chunk's tokens with the first's, then each chunk
/// by itself. A pair of one chunk has the last part alone.
enum class Part { kAcross, kSecond, kFirst };

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

/// What the computing warpgroups have to know of the next chunk, the second of its pair if odd.
struct GradientItem {
  Work work;
  int c;      // -1: there is none
  bool both;  // whether its pair has two
};

struct GradientShared {
  static constexpr int kStages = 9;  // of the ring, beside which Q and K of a chunk lie
  static constexpr int kGradientGateStages = 3;
  alignas(1024) uint8_t tiles[kStages + 2][kTileBytes];
  alignas(1024) uint8_t d_p[kMatrixBytes];  // dP^T
  alignas(1024) uint8_t d_g[kMatrixBytes];  // dG^T
  alignas(1024) uint8_t d_p_across[kMatrixBytes];
  alignas(1024) uint8_t d_g_across[kMatrixBytes];
  GateVectors gates[kGradientGateStages];
  ChunkSums sums[2];
  GradientItem items[2];  // with the chunk's keys
  alignas(8) uint64_t full[kStages], empty[kStages];
  uint64_t gate_full[kGradientGateStages], gate_empty[kGradientGateStages];
  uint64_t sums_full[2], sums_empty[2];
  uint64_t d_p_full[1], d_p_empty[1];
  uint64_t across_full[1], across_empty[1];
};

/// Which of the tiles in shared memory is where in the ring. Q and K come through it long before
/// their chunk begins; then they leave it, and the tiles of the chunk before's take their places.
struct GradientRing {
  uint64_t tiles = 0x876543210;  // 4 bits each
  uint32_t q = GradientShared::kStages;
  uint32_t k = GradientShared::kStages + 1;

  /// That of the n-th load.
  __device__ __forceinline__ uint32_t tile(uint32_t n) const {
    return static_cast<uint32_t>(tiles >> shift(n)) & 15;
  }
  /// Lets the n-th load be `keys`, q or k.
  __device__ __forceinline__ void exchange(uint32_t n, uint32_t& keys) {
    const uint32_t loaded = tile(n);
    tiles ^= static_cast<uint64_t>(loaded ^ keys) << shift(n);
    keys = loaded;
  }

 private:
  static __device__ __forceinline__ uint32_t shift(uint32_t n) {
    return 4 * (n % GradientShared::kStages);
  }
};

/// Calls body(pair, work, c, both) for every pair of chunks and key head that is this block's:
/// `pair` is counted over all sequences, `work` is its sequence and the key head's first value
/// head, `c` the first chunk's number in it, `both` whether there is a second.
template <typename Body>
__device__ __forceinline__ void for_each_pair(const BackwardArguments& p, int lane, Body body) {
  for (int item = static_cast<int>(blockIdx.x);; item += static_cast<int>(gridDim.x)) {
    const int pair = item / p.H;
    const Piece piece = find_piece(p, kPairTokens, pair, lane);
    if (piece.sequence == p.N) return;
    const Work work(p, piece.sequence, item % p.H * (p.HV / p.H));
    const int c = 2 * piece.index;
    body(pair, work, c, c + 1 < work.chunks);
  }
}

/// Calls body(work, c, both, part) for every part and value head.
template <typename Body>
__device__ __forceinline__ void for_each_part(const BackwardArguments& p, int lane, Body body) {
  const int group = p.HV / p.H;
  for_each_pair(p, lane, [&](int, const Work& pair, int c, bool both) {
    for (int part = both ? 0 : 2; part <= 2; ++part) {
      // Each begins with the value head that the one before ends with (load_gradient_tiles).
      const bool backwards = both && static_cast<Part>(part) != Part::kSecond;
      Work work = pair;
      for (int h = 0; h < group; ++h) {
        work.value_head = pair.value_head + (backwards ? group - 1 - h : h);
        body(work, c, both, static_cast<Part>(part));
      }
    }
  });
}

__device__ inline void load_gradient_tiles(const BackwardArguments& p, GradientShared& shared,
                                           int lane) {
  enum Tensor { kQ, kK, kDO, kDV, kU, kS, kDS };
  const int group = p.HV / p.H;
  const ConstView4 d_v_view = {p.d_v_view.data, p.d_v_view.stride_b, p.d_v_view.stride_t,
                               p.d_v_view.stride_h};
  const uint64_t keep = keep_policy();
  const uint64_t last_use = last_use_policy();
  GradientRing ring;
  uint32_t next = 0;
  uint32_t chunks = 0;
  const auto wait_empty = [&] {
    const auto stage = slot(shared.full, next);
    mbarrier_wait(shared_address(&shared.empty[stage.stage]), stage.parity ^ 1);
    return shared_address(&shared.full[stage.stage]);
  };
  for_each_pair(p, lane, [&](int pair, Work work, int c, bool both) {
    // The second chunk's keys, the first's K, and what lies across; the second's tiles; the first's
    // keys, its tiles; the second's Q and K again.
    const int first_value_head = work.value_head;
    for (int step = both ? 0 : 4; step <= (both ? 6 : 5); ++step) {
      const bool chunk_keys = step == 0 || step == 4;
      const bool keys = chunk_keys || step == 1 || step == 6;
      const int heads = keys ? 1 : group;
      const int tiles = step == 1   ? 1
                        : keys      ? 2
                        : step == 2 ? static_cast<int>(kTilesAcross)
                                    : static_cast<int>(kTiles);
      // Each part begins with the value head that the one before ends with, and of which it finds
      // dO and dV, or S and dS', in shared memory.
      const bool after_across = step == 3;
      const bool after_second = step == 5 && both;
      const bool backwards = step == 2 || after_second;
      for (int item = 0; item < heads * tiles; ++item) {
        const int tile = item % tiles;
        if (after_across && (item == kTileDO || item == kTileDV)) continue;
        if (after_second && item >= kTileS && item < kTiles) continue;
        const int index = item / tiles;
        work.value_head = first_value_head + (backwards ? group - 1 - index : index);
        Tensor tensor = kK;
        int chunk = c;
        if (keys) {
          if (step != 1 && tile == 0) tensor = kQ;
          if (step == 0 || step == 6) chunk = c + 1;
        } else {
          tensor = tile == kTileDO   ? kDO
                   : tile == kTileU  ? kU
                   : tile == kTileDV ? kDV
                   : tile < kTileDS  ? kS
                                     : kDS;
          if (step == 3 || (step == 2 && tile != kTileU)) chunk = c + 1;
        }
        // Each part is loaded some 20 us after the one before: what it shares with that is still in
        // the L2 cache if everything else lets go.
        const bool again =
            step <= 1 || (step == 2 && (tile == kTileU || work.value_head > first_value_head)) ||
            (step == 3 && tile >= kTileS && index + 1 < group);
        const uint64_t policy = again ? keep : last_use;
        const uint32_t address = shared_address(shared.tiles[ring.tile(next)]);
        const uint32_t full = wait_empty();
        if (chunk_keys) {
          if (tile == 0) {
            if (lane == 0) shared.items[chunks % 2] = {work, chunk, both};
            ++chunks;
            ring.exchange(next, ring.q);
          } else {
            ring.exchange(next, ring.k);
          }
        }
        ++next;
        if (tensor <= kDV) {
          ConstView4 view = d_v_view;
          if (tensor == kQ) view = p.q_view;
          if (tensor == kK) view = p.k_view;
          if (tensor == kDO) view = p.d_o_view;
          const CUtensorMap* map = tensor == kQ    ? &p.q
                                   : tensor == kK  ? &p.k
                                   : tensor == kDO ? &p.d_o
                                                   : &p.d_v;
          const int head = keys ? work.key_head : work.value_head;
          load_tile(address, map, element(view, work, head, int64_t{chunk} * kChunk), view.stride_t,
                    head, work, chunk, full, lane, policy);
        } else if (lane == 0) {
          const int64_t entry = p.entry(pair, work.value_head);
          const uint8_t* source =
              tensor == kU
                  ? p.u + p.entry(2 * int64_t{pair} + chunk - c, work.value_head) * kWritesBytes
              : tensor == kS ? p.s + entry * kStateBytes + (tile - kTileS) * kTileBytes
                             : p.d_s + entry * kStateBytes + (tile - kTileDS) * kTileBytes;
          mbarrier_arrive_expect(full, kTileBytes);
          bulk_load(address, source, kTileBytes, full, policy);
        }
      }
    }
  });
  const uint32_t full = wait_empty();
  if (lane == 0) {
    shared.items[chunks % 2].c = -1;
    mbarrier_arrive(full);
  }
}

/// Gates of every part. Those of a chunk by itself have from_start begin where its pair does, and
/// to_end and `written` end where that ends; across, from_start is of the second chunk's tokens,
/// from where it begins, to_end, `written` and beta of the first's.
__device__ inline void load_gradient_gates(const BackwardArguments& p, GradientShared& shared,
                                           int lane) {
  uint32_t next = 0;
  for_each_part(p, lane, [&](const Work& work, int c, bool both, Part part) {
    const auto gate = slot(shared.gate_full, next++);
    GateVectors& out = shared.gates[gate.stage];
    const bool second = part == Part::kSecond;
    const GatePair own = fetch_gates(p, work, second ? c + 1 : c, lane);
    GatePair other = {{0, 0}, {0, 0}};
    if (both) other = fetch_gates(p, work, second ? c : c + 1, lane);
    store_gates(own, p.scale, out, shared_address(&shared.gate_empty[gate.stage]), gate.parity ^ 1,
                lane);
    const float2 b = sum_gates(other.g, lane);
    const float decay = exp2_approx(__shfl_sync(0xffffffffU, b.y, 31));
    const auto multiply = [&](float* vector, float2 factor) {
      float2& x = reinterpret_cast<float2*>(vector)[lane];
      x = {x.x * factor.x, x.y * factor.y};
    };
    if (second) {
      multiply(out.from_start, {decay, decay});
      multiply(out.from_start_scaled, {decay, decay});
    } else if (part == Part::kFirst) {
      multiply(out.to_end, {decay, decay});
      multiply(out.written, {decay, decay});
    } else {
      const float2 from_start = {exp2_approx(b.x), exp2_approx(b.y)};
      reinterpret_cast<float2*>(out.from_start)[lane] = from_start;
      reinterpret_cast<float2*>(out.from_start_scaled)[lane] = {p.scale * from_start.x,
                                                                p.scale * from_start.y};
    }
    __syncwarp();
    if (lane == 0) mbarrier_arrive(shared_address(&shared.gate_full[gate.stage]));
  });
}

__device__ __forceinline__ float sum_warp(float x) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    x += __shfl_xor_sync(0xffffffffU, x, distance);
  }
  return x;
}

/// One lane's part of a chunk's sums (ChunkSums), complete: tokens 2 l and 2 l + 1.
struct TokenSums {
  float2 read, written, row, column, diagonal;
  float through;  // times the chunk's decay
};

/// dg and dbeta of one lane's two tokens.
struct GateGradients {
  float2 d_g, d_beta;
};

/// Of a chunk, from its sums.
__device__ __forceinline__ GateGradients gate_gradients(const TokenSums& sums, float2 beta,
                                                        int lane) {
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
  return {d_g, d_beta};
}

/// Calls body(index in d_g and d_beta, second token or not) for those of the lane's two tokens of
/// chunk c that there are.
template <typename Body>
__device__ __forceinline__ void for_each_gate(const ProblemArguments& p, const Work& work, int c,
                                              int lane, Body body) {
  const int64_t token = int64_t{c} * kChunk + 2 * lane;
  const int64_t first = (work.batch * p.T + work.begin + token) * p.all_heads + work.value_head;
  if (token < work.length) body(first, false);
  if (token + 1 < work.length) body(first + p.all_heads, true);
}

__device__ __forceinline__ void store_gate_gradients(const ProblemArguments& p, float* d_g,
                                                     float* d_beta, const Work& work, int c,
                                                     const GateGradients& gradients, int lane) {
  for_each_gate(p, work, c, lane, [&](int64_t i, bool second) {
    d_g[i] = second ? gradients.d_g.y : gradients.d_g.x;
    d_beta[i] = second ? gradients.d_beta.y : gradients.d_beta.x;
  });
}

__device__ __forceinline__ GateGradients load_gate_gradients(const ProblemArguments& p,
                                                             const float* d_g, const float* d_beta,
                                                             const Work& work, int c, int lane) {
  GateGradients gradients = {{0, 0}, {0, 0}};
  for_each_gate(p, work, c, lane, [&](int64_t i, bool second) {
    (second ? gradients.d_g.y : gradients.d_g.x) = d_g[i];
    (second ? gradients.d_beta.y : gradients.d_beta.x) = d_beta[i];
  });
  return gradients;
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

/// dg and dbeta of every chunk; lane l has tokens 2 l and 2 l + 1. Each part of a pair adds what it
/// gives to the gates of both chunks: what crosses a token of the one may begin or end in the
/// other.
__device__ inline void store_gate_gradients(const BackwardArguments& p, GradientShared& shared,
                                            int lane) {
  uint32_t next = 0;
  for_each_part(p, lane, [&](const Work& work, int c, bool both, Part part) {
    const auto gate = slot(shared.gate_full, next);
    const auto stage = slot(shared.sums_full, next);
    ++next;
    // What the same lane has left there, on its way while the sums are made.
    GateGradients all[2] = {};
    if (both && part != Part::kAcross) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        all[i] = load_gate_gradients(p, p.d_g, p.d_beta, work, c + i, lane);
      }
    }
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
    const auto add = [](float2& x, float2 y) { x = {x.x + y.x, x.y + y.y}; };
    if (part == Part::kAcross) {
      TokenSums first = {};
      TokenSums second = {};
      first.column = sums.column;
      second.read = sums.row;
      all[0] = gate_gradients(first, beta, lane);
      all[1] = gate_gradients(second, beta, lane);
    } else {
      // <S, dS'>, and what is read or written in this chunk, crosses all of the other one's tokens.
      TokenSums own = sums;
      const bool is_second = part == Part::kSecond;
      float other = sum_warp(is_second ? sums.read.x + sums.read.y
                                       : beta.x * sums.written.x + beta.y * sums.written.y);
      if (is_second) other += sums.through;
      if (both && !is_second) own.through = 0;  // came with the second chunk
      const GateGradients gradients = gate_gradients(own, beta, lane);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const bool is_own = i == (is_second ? 1 : 0);
        add(all[i].d_g, is_own ? gradients.d_g : float2{other, other});
        if (is_own) add(all[i].d_beta, gradients.d_beta);
      }
    }
    store_gate_gradients(p, p.d_g, p.d_beta, work, c, all[0], lane);
    if (both) store_gate_gradients(p, p.d_g, p.d_beta, work, c + 1, all[1], lane);
  });
}

}  // namespace gdn::kernels::cuda::sm90
