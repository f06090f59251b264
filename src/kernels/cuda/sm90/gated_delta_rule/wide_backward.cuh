// What the kernels of the backward for wide heads (K to 256, any V) share; docs/hopper_backward.md
// has the mathematics, and its section on wide heads what differs.
//
//   matrices, replay   S of every chunk, U^ = U / beta, T, P (wide_matrices.cuh, wide_scan.cuh)
//   scan               from the last chunk to the first: dS' of every chunk, dV
//   gradients          every chunk by itself: dQ, dK, and the sums that dg and dbeta need
//   gates              dg and dbeta
#pragma once

#include <gdn/kernels/cuda/sm90/gated_delta_rule/wide_layout.cuh>

namespace gdn::kernels::cuda::sm90 {

inline constexpr int kWideHalves = kWideKeys / kHeadDim;  // of K, each 128

/// What one half of K gives to dg and dbeta of a chunk and value head, tokens in pairs. The sums
/// that need no K, row to diagonal, are the first half's alone.
struct WideGateSums {
  float2 read[kChunk / 2], written[kChunk / 2];
  float2 row[kChunk / 2], column[kChunk / 2], diagonal[kChunk / 2];
  alignas(128) float through;  // times the chunk's decay
};

struct WideBackwardArguments : WideReplayArguments, GradientTensors {
  uint8_t* d_s;             // [chunks, HV, slices]: dS'^T, kWideStateBytes each
  WideGateSums* gate_sums;  // [chunks, HV][kWideHalves]
  float* group_sums;        // [blocks of the gradients kernel][kWideGroupSums]
};

}  // namespace gdn::kernels::cuda::sm90
