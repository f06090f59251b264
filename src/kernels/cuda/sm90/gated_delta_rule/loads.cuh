// The loading role: one warp brings q, k and v to shared memory, another one the gates.
#pragma once

#include <gdn/kernels/cuda/sm90/gated_delta_rule/layout.cuh>

namespace gdn::kernels::cuda::sm90 {

/// Copies the `tokens` first rows of a [64, 64 kHalves] tile by ordinary loads, zeros below: the
/// tile must not see what follows its sequence (TMA would read the next one's tokens). Columns from
/// `columns` on, a multiple of 8, are zero too.
template <int kHalves = 2>
__device__ void load_ragged_tile(uint32_t tile, const uint16_t* source, int64_t stride_t,
                                 int tokens, int lane, int columns = kHalves * kHalf) {
  constexpr int kPieces = 8 * kHalves;  // in a row
  const int piece = lane % kPieces;
  for (int row = lane / kPieces; row < kChunk; row += 32 / kPieces) {
    uint4 values = {0, 0, 0, 0};
    if (row < tokens && piece * 8 < columns) {
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

template <typename Shared>
__device__ void load_tiles(const ProblemArguments& p, const Work& work, Shared& shared, int lane) {
  for (int c = 0; c < work.chunks; ++c) {
    const auto key = slot(shared.key_full, c);
    const auto value = slot(shared.value_full, c);
    const int tokens = work.tokens(c);
    const uint32_t k = shared_address(shared.k[key.stage]);
    const uint32_t q = shared_address(shared.q[key.stage]);
    const uint32_t v = shared_address(shared.v[value.stage]);
    const uint32_t key_full = shared_address(&shared.key_full[key.stage]);
    const uint32_t value_full = shared_address(&shared.value_full[value.stage]);
    mbarrier_wait(shared_address(&shared.key_empty[key.stage]), key.parity ^ 1);
    if (tokens == kChunk) {
      const int token = static_cast<int>(work.begin) + c * kChunk;
      if (lane == 0) {
        mbarrier_arrive_expect(key_full, 2 * kTileBytes);
        for (int half = 0; half < 2; ++half) {
          const int x = half * kHalf;
          const uint32_t offset = half * kHalfTileBytes;
          tma_load(k + offset, &p.k, key_full, x, work.key_head, token, work.batch);
          tma_load(q + offset, &p.q, key_full, x, work.key_head, token, work.batch);
        }
      }
      mbarrier_wait(shared_address(&shared.value_empty[value.stage]), value.parity ^ 1);
      if (lane == 0) {
        mbarrier_arrive_expect(value_full, kTileBytes);
        for (int half = 0; half < 2; ++half) {
          tma_load(v + half * kHalfTileBytes, &p.v, value_full, half * kHalf, work.value_head,
                   token, work.batch);
        }
      }
    } else {
      const int64_t token = int64_t{c} * kChunk;
      load_ragged_tile(k, element(p.k_view, work, work.key_head, token), p.k_view.stride_t, tokens,
                       lane);
      load_ragged_tile(q, element(p.q_view, work, work.key_head, token), p.q_view.stride_t, tokens,
                       lane);
      fence_async_proxy();
      __syncwarp();
      if (lane == 0) mbarrier_arrive(key_full);
      mbarrier_wait(shared_address(&shared.value_empty[value.stage]), value.parity ^ 1);
      load_ragged_tile(v, element(p.v_view, work, work.value_head, token), p.v_view.stride_t,
                       tokens, lane);
      __syncwarp();
      if (lane == 0) mbarrier_arrive(value_full);
    }
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
  const int64_t first = (work.batch * p.T + work.begin) * p.HV + work.value_head;
  const int64_t token = int64_t{c} * kChunk + 2 * lane;
  GatePair gates = {{0, 0}, {0, 0}};
  if (token < work.length) {
    gates.g.x = p.g[first + token * p.HV];
    gates.beta.x = p.beta[first + token * p.HV];
  }
  if (token + 1 < work.length) {
    gates.g.y = p.g[first + (token + 1) * p.HV];
    gates.beta.y = p.beta[first + (token + 1) * p.HV];
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

template <typename Shared>
__device__ void load_gates(const ProblemArguments& p, const Work& work, Shared& shared, int lane) {
  GatePair next = fetch_gates(p, work, 0, lane);
  for (int c = 0; c < work.chunks; ++c) {
    const auto gate = slot(shared.gate_full, c);
    const GatePair gates = next;
    if (c + 1 < work.chunks) next = fetch_gates(p, work, c + 1, lane);
    store_gates(gates, p.scale, shared.gates[gate.stage],
                shared_address(&shared.gate_empty[gate.stage]), gate.parity ^ 1, lane);
    if (lane == 0) mbarrier_arrive(shared_address(&shared.gate_full[gate.stage]));
  }
}

}  // namespace gdn::kernels::cuda::sm90
