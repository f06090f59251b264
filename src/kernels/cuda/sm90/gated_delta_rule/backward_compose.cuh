// dS at the boundaries of the scan's spans, from every span's affine map: backward_scan.cuh says
// which.
#pragma once

#include <gdn/kernels/cuda/sm90/gated_delta_rule/backward.cuh>

namespace gdn::kernels::cuda::sm90 {

inline constexpr int kComposeThreads = 256;
inline constexpr int kComposeColumns = 16;  // of V, a block
inline constexpr int kComposeBlocks = kHeadDim / kComposeColumns;

/// From every span's R and M, dS at every span's start, in R's place: R + M (dS at the next one's).
/// One block a sequence, value head and 16 columns; a thread has 8 elements of one row.
static __global__ void __launch_bounds__(kComposeThreads)
    gated_delta_rule_compose_kernel(const __grid_constant__ BackwardArguments p) {
  __shared__ float next[kHeadDim][kComposeColumns];
  const int first_column = blockIdx.x % kComposeBlocks * kComposeColumns;
  const int value_head = blockIdx.x / kComposeBlocks % p.HV;
  const int sequence = blockIdx.x / kComposeBlocks / p.HV;
  const int first = first_piece(p, p.span_tokens, sequence, threadIdx.x % 32);
  const int count = piece_count(p, sequence, p.span_tokens);
  if (count == 0 && p.window_begin == 0 && p.d_initial_state != nullptr) {
    // No token, no span: what comes in goes out.
    const int64_t state = (int64_t{sequence} * p.all_heads + value_head) * kStateSize;
    constexpr int kPart = kStateSize / kComposeBlocks;
    const int64_t begin = state + blockIdx.x % kComposeBlocks * kPart;
    for (int i = threadIdx.x; i < kPart; i += kComposeThreads) {
      p.d_initial_state[begin + i] = p.d_final_state != nullptr ? p.d_final_state[begin + i] : 0.0F;
    }
  }
  const int row = threadIdx.x / 2;
  const int column = threadIdx.x % 2 * 8;
  float sum[8];
  for (int span = count - 1; span >= 1; --span) {
    const int64_t state = (int64_t{first + span} * p.HV + value_head) * kStateSize;
    float* start = p.span_starts + state + row * kHeadDim + first_column + column;
#pragma unroll
    for (int i = 0; i < 8; ++i) sum[i] = start[i];
    if (span < count - 1) {
      const float* m = p.span_transitions + state + row * kHeadDim;
#pragma unroll 8
      for (int k = 0; k < kHeadDim; ++k) {
#pragma unroll
        for (int i = 0; i < 8; ++i) sum[i] += m[k] * next[k][column + i];
      }
      __syncthreads();
#pragma unroll
      for (int i = 0; i < 8; ++i) start[i] = sum[i];
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) next[row][column + i] = sum[i];
    __syncthreads();
  }
}

}  // namespace gdn::kernels::cuda::sm90
