// The scan's shared memory and its loading warpgroup: tiles and gates in, Q scaled.
#pragma once

#include <gdn/kernels/cuda/sm90/gated_delta_rule/backward.cuh>
#include <gdn/kernels/cuda/sm90/gated_delta_rule/state.cuh>

namespace gdn::kernels::cuda::sm90 {

inline constexpr int kScanLoadRegisters = 40;
inline constexpr int kScanStateRegisters = 232;

// With one half a thread may hold 255 from the start.
template <int kHalves>
constexpr int kScanThreads = 128 * (1 + kHalves);

/// What a scan is for: dS' of every chunk and dV, or dS at the start alone.
enum class Pass { kGradients, kSpans };

/// kHalves halves of V in a block.
template <int kHalves>
struct ScanShared {
  static constexpr int kStages = kHalves == 2 ? 2 : 3;
  alignas(1024) uint8_t k[kStages][kTileBytes];
  alignas(1024) uint8_t q[kStages][kTileBytes];
  alignas(1024) uint8_t d_o[kStages][kHalves * kHalfTileBytes];
  alignas(1024) uint8_t matrices[kStages][kMatricesBytes];
  alignas(1024) uint8_t d_s[kHalves][kStateHalfBytes];  // on their way out
  alignas(1024) uint8_t d_v[2][kHalves][kHalfTileBytes];
  GateVectors gates[kGateStages];
  alignas(8) uint64_t full[kStages], empty[kStages];
  uint64_t scaled[kStages];  // Q is
  uint64_t gate_full[kGateStages], gate_empty[kGateStages];
};

/// The work's chunks from the last to the first: step i is chunk chunks - 1 - i.
template <int kHalves>
__device__ void load_scan_tiles(const BackwardArguments& p, const Work& work, int64_t first_chunk,
                                int first_half, bool with_d_o, ScanShared<kHalves>& shared,
                                int lane) {
  for (int i = 0; i < work.chunks; ++i) {
    const int c = work.chunks - 1 - i;
    const auto stage = slot(shared.full, i);
    const uint32_t k = shared_address(shared.k[stage.stage]);
    const uint32_t q = shared_address(shared.q[stage.stage]);
    const uint32_t d_o = shared_address(shared.d_o[stage.stage]);
    const uint32_t full = shared_address(&shared.full[stage.stage]);
    mbarrier_wait(shared_address(&shared.empty[stage.stage]), stage.parity ^ 1);
    const int tokens = work.tokens(c);
    if (tokens == kChunk) {
      const int token = static_cast<int>(work.begin) + c * kChunk;
      if (lane == 0) {
        mbarrier_arrive_expect(
            full, 2 * kTileBytes + kMatricesBytes + (with_d_o ? kHalves * kHalfTileBytes : 0));
        for (int half = 0; half < 2; ++half) {
          const uint32_t offset = half * kHalfTileBytes;
          tma_load(k + offset, &p.k, full, half * kHalf, work.key_head, token, work.batch);
          tma_load(q + offset, &p.q, full, half * kHalf, work.key_head, token, work.batch);
        }
        for (int half = 0; with_d_o && half < kHalves; ++half) {
          tma_load(d_o + half * kHalfTileBytes, &p.d_o, full, (first_half + half) * kHalf,
                   work.value_head, token, work.batch);
        }
      }
    } else {
      const int64_t token = int64_t{c} * kChunk;
      load_ragged_tile(k, element(p.k_view, work, work.key_head, token), p.k_view.stride_t, tokens,
                       lane);
      load_ragged_tile(q, element(p.q_view, work, work.key_head, token), p.q_view.stride_t, tokens,
                       lane);
      if (with_d_o) {
        load_ragged_tile<kHalves>(
            d_o, element(p.d_o_view, work, work.value_head, token) + first_half * kHalf,
            p.d_o_view.stride_t, tokens, lane);
      }
      fence_async_proxy();
      __syncwarp();
      if (lane == 0) mbarrier_arrive_expect(full, kMatricesBytes);
    }
    if (lane == 0) {
      bulk_load(shared_address(shared.matrices[stage.stage]),
                p.matrices + p.entry(first_chunk + c, work.value_head) * kMatricesBytes,
                kMatricesBytes, full);
    }
  }
}

template <int kHalves>
__device__ void load_scan_gates(const BackwardArguments& p, const Work& work,
                                ScanShared<kHalves>& shared, int lane) {
  if (work.chunks == 0) return;  // before the first chunk lies another sequence, or nothing
  GatePair next = fetch_gates(p, work, work.chunks - 1, lane);
  for (int i = 0; i < work.chunks; ++i) {
    const auto gate = slot(shared.gate_full, i);
    const GatePair gates = next;
    if (i + 1 < work.chunks) next = fetch_gates(p, work, work.chunks - 2 - i, lane);
    store_gates(gates, p.scale, shared.gates[gate.stage],
                shared_address(&shared.gate_empty[gate.stage]), gate.parity ^ 1, lane);
    if (lane == 0) mbarrier_arrive(shared_address(&shared.gate_full[gate.stage]));
  }
}

/// Q <- scale exp(b) Q in every stage, by two warps; `thread` of 64.
template <typename Element, int kHalves>
__device__ void scale_queries(const Work& work, ScanShared<kHalves>& shared, int thread) {
  const int piece = thread % 8;  // of a row of 128 bytes
  for (int i = 0; i < work.chunks; ++i) {
    const auto stage = slot(shared.full, i);
    const auto gate = slot(shared.gate_full, i);
    mbarrier_wait(shared_address(&shared.gate_full[gate.stage]), gate.parity);
    mbarrier_wait(shared_address(&shared.full[stage.stage]), stage.parity);
    const float* factors = shared.gates[gate.stage].from_start_scaled;
    const uint32_t q = shared_address(shared.q[stage.stage]);
#pragma unroll 4
    for (int row = thread / 8; row < 2 * kChunk; row += 8) {
      // Rows 64 to 127 are the second half of the elements.
      const float factor = factors[row % kChunk];
      const uint32_t address = q + static_cast<uint32_t>(row * 128 + piece * 16);
      const uint4 x = load_16_bytes(address);
      const uint32_t in[4] = {x.x, x.y, x.z, x.w};
      uint32_t out[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float2 pair = unpack<Element>(in[e]);
        out[e] = pack<Element>(pair.x * factor, pair.y * factor);
      }
      store_16_bytes(address, {out[0], out[1], out[2], out[3]});
    }
    fence_async_proxy();
    __syncwarp();
    if (thread % 32 == 0) {
      mbarrier_arrive(shared_address(&shared.scaled[stage.stage]));
      mbarrier_arrive(shared_address(&shared.gate_empty[gate.stage]));
    }
  }
}

}  // namespace gdn::kernels::cuda::sm90
