// What the three kernels of the Hopper backward share; docs/hopper_backward.md derives them.
//
//   replay     from the forward's segment states: S of every chunk, U^ = U / beta, T, P
//   scan       from the last chunk to the first: dS' of every chunk, dV
//   gradients  every chunk by itself: dQ, dK, dg, dbeta
//
// With G = strict_lower(K K^T * D), P = scale lower(Q K^T * D), T = (I + G diag(beta))^-1:
//   U^ = T (V - diag(exp b) K S)     U = diag(beta) U^
//   dU = P^T dO + diag(exp(b_C - b)) K dS'     dV = T^T diag(beta) dU
//   dS = exp(b_C) dS' + scale Q^T diag(exp b) dO - K^T diag(exp b) dV
#pragma once

#include <gdn/kernels/cuda/sm90/gated_delta_rule/layout.cuh>
#include <gdn/kernels/cuda/sm90/gated_delta_rule/loads.cuh>
#include <gdn/kernels/cuda/sm90/gated_delta_rule/pieces.cuh>

namespace gdn::kernels::cuda::sm90 {

/// What one chunk of one value head leaves in scratch memory: tiles as they lie in shared memory,
/// swizzled, so that plain bulk copies carry them.
inline constexpr int kStateHalfBytes = kTileBytes;       // 64 of V x K: two tiles of 64 of K
inline constexpr int kStateBytes = 2 * kStateHalfBytes;  // S^T and dS'^T, V x K
inline constexpr int kMatricesBytes = 2 * kMatrixBytes;  // T^T, P
inline constexpr int kWritesBytes = kTileBytes;          // U^: two tiles of 64 tokens x 64 of V
inline constexpr int kScratchBytes = 2 * kStateBytes + kMatricesBytes + kWritesBytes;

/// What backwards have beside the problem and what they keep in scratch memory.
struct GradientTensors {
  CUtensorMap d_o, d_v;  // [B, T, HV, V]
  ConstView4 d_o_view;
  MutableView4 d_q, d_k;       // [B, T, H, K]
  MutableView4 d_v_view;       // [B, T, HV, V]
  float* d_g;                  // [B, T, HV]
  float* d_beta;               // [B, T, HV]
  const float* d_final_state;  // [N, HV, K, V] or null
  float* d_initial_state;      // [N, HV, K, V] or null
  float* carry;                // scratch: [N, HV, K, V], dS between windows; with several of them
};

/// The ends of a window of a sequence: dS at its end and where dS at its start goes. Null: zero,
/// nowhere. Both lie as the problem's states do.
struct WindowEnds {
  const float* from;
  float* to;
};

template <typename Arguments>
__device__ __forceinline__ WindowEnds window_ends(const Arguments& p, const Work& work) {
  const int64_t state_size = int64_t{p.K} * p.V;
  const int64_t head = (int64_t{work.sequence} * p.all_heads + work.value_head) * state_size;
  float* carry = p.carry + (int64_t{work.sequence} * p.HV + work.value_head) * state_size;
  WindowEnds ends = {carry, carry};
  if (sequence_tokens(p, work.sequence) - p.window_begin <= p.window_tokens) {
    ends.from = p.d_final_state != nullptr ? p.d_final_state + head : nullptr;
  }
  if (p.window_begin == 0) {
    ends.to = p.d_initial_state != nullptr ? p.d_initial_state + head : nullptr;
  }
  return ends;
}

/// Whether the window has nothing to do for a sequence; one without tokens has its states in the
/// first.
__device__ __forceinline__ bool absent(const ProblemArguments& p, const Work& work) {
  return work.length == 0 && p.window_begin > 0;
}

struct BackwardArguments : ProblemArguments, GradientTensors {
  const float* segment_states;      // [segments, HV, K, V]
  uint8_t *s, *d_s, *matrices, *u;  // scratch: [chunks, HV] of the sizes above
  int span_tokens;                  // the scan's spans; 0: whole sequences
  float* span_starts;               // [spans, HV, K, V], dS; backward_scan.cuh
  float* span_transitions;          // [spans, HV, K, K]

  /// Which entry of the scratch arrays belongs to a chunk, counted over all sequences.
  __device__ __forceinline__ int64_t entry(int64_t chunk, int value_head) const {
    return chunk * HV + value_head;
  }
};

/// One arrival of the calling warp.
__device__ __forceinline__ void release(uint64_t& barrier, int lane) {
  __syncwarp();
  if (lane == 0) mbarrier_arrive(shared_address(&barrier));
}

/// Fills a [64 tokens, 128] tile, whole chunks by TMA, and completes a phase of `full`.
__device__ __forceinline__ void load_tile(uint32_t tile, const CUtensorMap* map,
                                          const uint16_t* rows, int64_t stride_t, int head,
                                          const Work& work, int c, uint32_t full, int lane) {
  const int tokens = work.tokens(c);
  if (tokens == kChunk) {
    if (lane != 0) return;
    mbarrier_arrive_expect(full, kTileBytes);
    for (int half = 0; half < 2; ++half) {
      tma_load(tile + half * kHalfTileBytes, map, full, half * kHalf, head,
               static_cast<int>(work.begin) + c * kChunk, work.batch);
    }
  } else {
    load_ragged_tile(tile, rows, stride_t, tokens, lane);
    fence_async_proxy();
    __syncwarp();
    if (lane == 0) mbarrier_arrive(full);
  }
}

}  // namespace gdn::kernels::cuda::sm90
