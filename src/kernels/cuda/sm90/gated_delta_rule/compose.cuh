// States at the boundaries of spans, from every span's affine map S -> R + M S: a sequence's maps
// are applied one after the other, in fp32 and in a fixed order.
#pragma once

#include <gdn/kernels/cuda/sm90/gated_delta_rule/pieces.cuh>

namespace gdn::kernels::cuda::sm90 {

struct ComposeArguments : ProblemArguments {
  int span_tokens, lead_tokens;
  int v_rows;                // V or more, a multiple of kComposeColumns
  float* states;             // [spans, HV, v_rows, 128], V first
  const float* transitions;  // M^T, [spans, HV, 128, 128]
};

inline constexpr int kComposeThreads = 2 * kHeadDim;
inline constexpr int kComposeColumns = 8;  // of V, a block

/// One block a sequence, value head and 8 of V's columns. On entry `states` holds R of every span
/// but a sequence's last, that of the first from the initial state; on return the state at the
/// span's end. Thread (k, part) has row k of M, columns 64 part to 64 part + 63.
static __global__ void __launch_bounds__(kComposeThreads)
    compose_spans_kernel(const __grid_constant__ ComposeArguments p) {
  constexpr int kPart = kHeadDim / 2;
  __shared__ __align__(16) float state[kHeadDim][kComposeColumns];  // at the span's start
  __shared__ __align__(16) float partial[kHeadDim][kComposeColumns];
  let_next_kernel_start();
  wait_for_previous_kernel();
  const int blocks = p.v_rows / kComposeColumns;
  const int first_column = blockIdx.x % blocks * kComposeColumns;
  const int value_head = blockIdx.x / blocks % p.HV;
  const int sequence = blockIdx.x / blocks / p.HV;
  const int first = first_piece(p, p.span_tokens, sequence, threadIdx.x % 32, 1, p.lead_tokens);
  const int count = piece_count(p, sequence, p.span_tokens, 1, p.lead_tokens);
  const int k = threadIdx.x % kHeadDim;
  const int part = threadIdx.x / kHeadDim;
  const auto entry = [&](int span) { return int64_t{first + span} * p.HV + value_head; };
  const auto load_transition = [&](float(&m)[kPart], int span) {
    const float* column = p.transitions + (entry(span) * kHeadDim + part * kPart) * kHeadDim + k;
#pragma unroll
    for (int j = 0; j < kPart; ++j) m[j] = column[j * kHeadDim];
  };
  const auto at = [&](int span) {
    return p.states + (entry(span) * p.v_rows + first_column) * kHeadDim + k;
  };
  float m[kPart], next[kPart], sum[kComposeColumns], r[kComposeColumns];
  if (count < 3) return;
  load_transition(next, 1);
  if (part == 0) {
#pragma unroll
    for (int i = 0; i < kComposeColumns; ++i) state[k][i] = at(0)[i * kHeadDim];
  }
  for (int span = 1; span < count - 1; ++span) {
#pragma unroll
    for (int j = 0; j < kPart; ++j) m[j] = next[j];
    // Ahead of their use: neither depends on the state.
    if (span + 1 < count - 1) load_transition(next, span + 1);
#pragma unroll
    for (int i = 0; i < kComposeColumns; ++i) {
      r[i] = part == 0 ? at(span)[i * kHeadDim] : 0.0F;
      sum[i] = 0;
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kPart; ++j) {
      const float4* x = reinterpret_cast<const float4*>(state[part * kPart + j]);
      const float4 low = x[0];
      const float4 high = x[1];
      const float columns[kComposeColumns] = {low.x,  low.y,  low.z,  low.w,
                                              high.x, high.y, high.z, high.w};
#pragma unroll
      for (int i = 0; i < kComposeColumns; ++i) sum[i] += m[j] * columns[i];
    }
    if (part == 1) {
#pragma unroll
      for (int i = 0; i < kComposeColumns; ++i) partial[k][i] = sum[i];
    }
    __syncthreads();
    if (part == 0) {
#pragma unroll
      for (int i = 0; i < kComposeColumns; ++i) {
        const float x = r[i] + (sum[i] + partial[k][i]);
        state[k][i] = x;
        at(span)[i * kHeadDim] = x;
      }
    }
  }
}

}  // namespace gdn::kernels::cuda::sm90
