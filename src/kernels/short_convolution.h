// Parameters of the short convolution: causal, depthwise, over W tokens.
//
//   y_t = activation(bias + sum_w weight_w * x_{t-W+1+w})
//
// Dimensions: B batch rows, T tokens a row, D channels, W taps, N sequences. Without cu_seqlens
// every batch row is a sequence, N = B. With cu_seqlens B is 1 and sequence n holds tokens
// cu_seqlens[n] to cu_seqlens[n+1]; it may be empty, and then its final state is its initial state.
// The tokens before a sequence's first one are its initial state, those of other sequences are
// never read.
#pragma once

#include <cstdint>

#include <gdn/kernels/types.h>

namespace gdn::kernels {

inline constexpr int64_t kMinTaps = 2;
inline constexpr int64_t kMaxTaps = 8;

struct ShortConvolutionProblem {
  int64_t B = 0, T = 0, D = 0, W = 0, N = 0;
  bool silu = false;                    // the activation; false: none
  DType dtype = DType::f32;             // of x, y, the states and their gradients
  DType weight_dtype = DType::f32;      // of weight and bias
  const int64_t* cu_seqlens = nullptr;  // [N + 1], host memory; null: N = B sequences of T tokens
  ConstView3 x;                         // [B, T, D]
  const void* weight = nullptr;         // [D, W] contiguous
  const void* bias = nullptr;           // [D], or null
  const void* initial_state = nullptr;  // [N, D, W - 1] contiguous, oldest first; null: zeros
  ParallelFor parallel_for = serial_for;
};

struct ShortConvolutionForward : ShortConvolutionProblem {
  MutableView3 y;               // [B, T, D]
  void* final_state = nullptr;  // [N, D, W - 1] contiguous, or null; may be the same memory as
                                // initial_state
};

struct ShortConvolutionBackward : ShortConvolutionProblem {
  ConstView3 d_y;                       // [B, T, D]
  const void* d_final_state = nullptr;  // [N, D, W - 1] contiguous, or null
  MutableView3 d_x;                     // [B, T, D]
  void* d_weight = nullptr;             // [D, W] contiguous fp32 (f64: double), or null
  void* d_bias = nullptr;               // [D] fp32 (f64: double), or null
  void* d_initial_state = nullptr;      // [N, D, W - 1] contiguous, or null
};

/// Where sequence n of a problem lies: batch row, first token, number of tokens.
struct SequenceSpan {
  int64_t b = 0, first = 0, length = 0;
};
inline SequenceSpan sequence_span(const ShortConvolutionProblem& p, int64_t n) {
  if (p.cu_seqlens == nullptr) return {n, 0, p.T};
  return {0, p.cu_seqlens[n], p.cu_seqlens[n + 1] - p.cu_seqlens[n]};
}

}  // namespace gdn::kernels
