// The loading role: warps that bring q, k, v and the gates to shared memory.
#pragma once

#include <gdn/kernels/cuda/sm90/gated_delta_rule/layout.cuh>

namespace gdn::kernels::cuda::sm90 {

/// Copies the `tokens` first rows of a [64, 64 kHalves] tile, `width` elements of each, by ordinary
/// loads, and zeros elsewhere: the tile must not see what follows its sequence (TMA would read the
/// next one's tokens).
template <int kHalves = 2>
__device__ void load_ragged_tile(uint32_t tile, const uint16_t* source, int64_t stride_t,
                                 int tokens, int lane, int width = kHeadDim) {
  constexpr int kPieces = 8 * kHalves;  // in a row
  const int piece = lane % kPieces;
  for (int row = lane / kPieces; row < kChunk; row += 32 / kPieces) {
    uint4 values = {0, 0, 0, 0};
    if (row < tokens && piece * 8 < width) {
      values = *reinterpret_cast<const uint4*>(source + row * stride_t + piece * 8);
    }
    const uint32_t address = tile + (piece / 8) * kHalfTileBytes + swizzled(row, piece % 8);
    store_16_bytes(address, values);
  }
}

/// First element of token `token` of the work's sequence.
__device__ __forceinline__ const uint16_t* element(const ConstView4& view, const Work& work,
                                                   int head, int64_t token) {
  return static_cast<const uint16_t*>(view.data) + work.batch * view.stride_b +
         (work.begin + token) * view.stride_t + head * view.stride_h;
}

/// Brings K, and Q where wanted, of chunk c.
template <typename Shared>
__device__ __forceinline__ void load_keys(const ProblemArguments& p, const Work& work,
                                          Shared& shared, int c, bool with_q, int lane) {
  const auto key = slot(shared.key_full, c);
  const int tokens = work.tokens(c);
  const uint32_t k = shared_address(shared.k[key.stage]);
  const uint32_t q = shared_address(shared.q[key.stage]);
  const uint32_t full = shared_address(&shared.key_full[key.stage]);
  mbarrier_wait(shared_address(&shared.key_empty[key.stage]), key.parity ^ 1);
  if (tokens == kChunk) {
    if (lane != 0) return;
    const int token = static_cast<int>(work.begin) + c * kChunk;
    mbarrier_arrive_expect(full, with_q ? 2 * kTileBytes : kTileBytes);
    for (int half = 0; half < 2; ++half) {
      const int x = half * kHalf;
      const uint32_t offset = half * kHalfTileBytes;
      tma_load(k + offset, &p.k, full, x, work.key_head, token, work.batch);
      if (with_q) tma_load(q + offset, &p.q, full, x, work.key_head, token, work.batch);
    }
  } else {
    const int64_t token = int64_t{c} * kChunk;
    load_ragged_tile(k, element(p.k_view, work, work.key_head, token), p.k_view.stride_t, tokens,
                     lane, p.K);
    if (with_q) {
      load_ragged_tile(q, element(p.q_view, work, work.key_head, token), p.q_view.stride_t, tokens,
                       lane, p.K);
    }
    fence_async_proxy();
    __syncwarp();
    if (lane == 0) mbarrier_arrive(full);
  }
}

/// Brings kHalves halves of V, from `first_half` on, of chunk c; where V is not wanted, its tile
/// keeps what it holds.
template <int kHalves, typename Shared>
__device__ __forceinline__ void load_values(const ProblemArguments& p, const Work& work,
                                            Shared& shared, int c, bool with_v, int first_half,
                                            int lane) {
  const auto value = slot(shared.value_full, c);
  const int tokens = work.tokens(c);
  const uint32_t v = shared_address(shared.v[value.stage]);
  const uint32_t full = shared_address(&shared.value_full[value.stage]);
  mbarrier_wait(shared_address(&shared.value_empty[value.stage]), value.parity ^ 1);
  if (tokens == kChunk && with_v) {
    if (lane != 0) return;
    mbarrier_arrive_expect(full, kHalves * kHalfTileBytes);
    for (int half = 0; half < kHalves; ++half) {
      tma_load(v + half * kHalfTileBytes, &p.v, full, (first_half + half) * kHalf, work.value_head,
               static_cast<int>(work.begin) + c * kChunk, work.batch);
    }
  } else {
    if (with_v) {
      const int first = first_half * kHalf;
      load_ragged_tile<kHalves>(
          v, element(p.v_view, work, work.value_head, int64_t{c} * kChunk) + first,
          p.v_view.stride_t, tokens, lane, p.V - first);
    }
    __syncwarp();
    if (lane == 0) mbarrier_arrive(full);
  }
}

/// Everything of every chunk.
template <typename Shared>
__device__ void load_tiles(const ProblemArguments& p, const Work& work, Shared& shared, int lane) {
  for (int c = 0; c < work.chunks; ++c) {
    load_keys(p, work, shared, c, true, lane);
    load_values<2>(p, work, shared, c, true, 0, lane);
  }
}

/// g in units of log 2. Below 2^-160 a decay is zero in fp32, and so is every product with it:
/// bounding it there changes nothing, keeps sums of an infinite g finite, and their rounding small.
__device__ __forceinline__ float bounded_log2_decay(float g) {
  constexpr float kLog2E = 1.4426950408889634F;
  const float x = g * kLog2E;
  return x < -160.0F ? -160.0F : x;  // keeps NaN
}

/// Gates of a chunk before their sums; lane l holds tokens 2 l and 2 l + 1.
struct GatePair {
  float2 g, beta;
};

/// Tokens past the end of the work neither decay nor write (g = beta = 0).
__device__ __forceinline__ GatePair fetch_gates(const ProblemArguments& p, const Work& work, int c,
                                                int lane) {
  const int64_t first = (work.batch * p.T + work.begin) * p.all_heads + work.value_head;
  const int64_t token = int64_t{c} * kChunk + 2 * lane;
  GatePair gates = {{0, 0}, {0, 0}};
  if (token < work.length) {
    gates.g.x = p.g[first + token * p.all_heads];
    gates.beta.x = p.beta[first + token * p.all_heads];
  }
  if (token + 1 < work.length) {
    gates.g.y = p.g[first + (token + 1) * p.all_heads];
    gates.beta.y = p.beta[first + (token + 1) * p.all_heads];
  }
  return gates;
}

/// Writes what the other roles need of a chunk's gates, once `empty` has reached `parity`.
__device__ __forceinline__ void store_gates(const GatePair& gates, float scale, GateVectors& out,
                                            uint32_t empty, uint32_t parity, int lane) {
  constexpr uint32_t kWarp = 0xffffffffU;
  const float2 x = {bounded_log2_decay(gates.g.x), bounded_log2_decay(gates.g.y)};
  float sum = x.x + x.y;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const float below = __shfl_up_sync(kWarp, sum, distance);
    if (lane >= distance) sum += below;
  }
  const float before = __shfl_up_sync(kWarp, sum, 1);
  float2 b;
  b.x = (lane == 0 ? 0.0F : before) + x.x;
  b.y = b.x + x.y;
  const float end = __shfl_sync(kWarp, b.y, 31);
  const float block_end = __shfl_sync(kWarp, b.y, lane | 7);

  mbarrier_wait(empty, parity);
  const auto store = [&](float* vector, float low, float high) {
    reinterpret_cast<float2*>(vector)[lane] = {low, high};
  };
  const float2 from_start = {exp2_approx(b.x), exp2_approx(b.y)};
  store(out.b, b.x, b.y);
  store(out.from_start, from_start.x, from_start.y);
  store(out.from_start_scaled, scale * from_start.x, scale * from_start.y);
  const float2 to_end = {exp2_approx(end - b.x), exp2_approx(end - b.y)};
  store(out.to_end, to_end.x, to_end.y);
  store(out.written, to_end.x * gates.beta.x, to_end.y * gates.beta.y);
  store(out.to_block_end, exp2_approx(block_end - b.x), exp2_approx(block_end - b.y));
  store(out.beta, gates.beta.x, gates.beta.y);
  __syncwarp();
}

/// Of kWarps warps that take turns, so that so many chunks' gates are on their way at a time, warp
/// `turn`.
template <int kWarps = 1, typename Shared>
__device__ void load_gates(const ProblemArguments& p, const Work& work, Shared& shared, int lane,
                           int turn = 0) {
  GatePair next = fetch_gates(p, work, turn, lane);
  for (int c = turn; c < work.chunks; c += kWarps) {
    const auto gate = slot(shared.gate_full, c);
    const GatePair gates = next;
    if (c + kWarps < work.chunks) next = fetch_gates(p, work, c + kWarps, lane);
    store_gates(gates, p.scale, shared.gates[gate.stage],
                shared_address(&shared.gate_empty[gate.stage]), gate.parity ^ 1, lane);
    if (lane == 0) mbarrier_arrive(shared_address(&shared.gate_full[gate.stage]));
  }
}

}  // namespace gdn::kernels::cuda::sm90
