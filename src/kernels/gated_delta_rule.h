// Parameters of the gated delta rule kernels (arXiv 2412.06464, equation 10 and section 3.3).
//
//   S_t = exp(g_t) S_{t-1} + k_t u_t^T     u_t = beta_t (v_t - exp(g_t) S_{t-1}^T k_t)
//   o_t = scale * S_t^T q_t
//
// Dimensions: B batch rows, T tokens a row, H query/key heads, HV value heads (value head h uses
// key head h / (HV / H)), K and V head sizes, N sequences. Without cu_seqlens every batch row is a
// sequence, N = B. With cu_seqlens B is 1 and sequence n holds tokens cu_seqlens[n] to
// cu_seqlens[n+1]; it may be empty, and then its final state is its initial state.
#pragma once

#include <cstdint>

#include <gdn/kernels/types.h>

namespace gdn::kernels {

/// Tokens between two of the states that a training forward keeps for the backward: the backward
/// replays one segment at a time. A multiple of every supported chunk size.
inline constexpr int64_t kSegmentTokens = 1024;

/// What forward and backward have in common.
struct GatedDeltaRuleProblem {
  int64_t B = 0, T = 0, H = 0, HV = 0, K = 0, V = 0, N = 0;
  int64_t chunk_size = 64;              // C; 16, 32, 64 or 128
  DType dtype = DType::f32;             // of q, k, v, o and their gradients
  double scale = 1.0;                   // of o; the caller resolves the default K^-1/2
  bool qk_l2norm = false;               // q, k <- x * rsqrt(sum(x^2) + 1e-6), in fp32
  bool state_v_first = false;           // states are [N, HV, V, K] instead of [N, HV, K, V]
  const int64_t* cu_seqlens = nullptr;  // [N + 1], host memory; null: N = B sequences of T tokens
  ConstView4 q, k;                      // [B, T, H, K]
  ConstView4 v;                         // [B, T, HV, V]
  const void* g = nullptr;              // [B, T, HV] contiguous log decay <= 0; fp32 (f64: double)
  const void* beta = nullptr;           // [B, T, HV] contiguous; fp32 (f64: double)
  const void* initial_state = nullptr;  // [N, HV, K, V] contiguous fp32 (f64: double); null: zeros
  ParallelFor parallel_for = serial_for;
  int64_t threads = 1;  // that parallel_for may use: how work is cut, no result depends on it
};

/// Number of segments of all sequences together, and the index of each sequence's first one:
/// sequence n owns segment states first_segment(n) to first_segment(n + 1) of one value head.
int64_t first_segment(const GatedDeltaRuleProblem& problem, int64_t n);
inline int64_t segment_count(const GatedDeltaRuleProblem& problem) {
  return first_segment(problem, problem.N);
}

struct GatedDeltaRuleForward : GatedDeltaRuleProblem {
  MutableView4 o;                   // [B, T, HV, V]; data null: only the states are wanted
  void* final_state = nullptr;      // [N, HV, K, V] contiguous fp32 (f64: double), or null;
                                    // may be the same memory as initial_state
  DType state_dtype = DType::f32;   // of both states but in f64; bf16: the CPU's recurrent form
  float* segment_states = nullptr;  // [segment_count, HV, K, V] fp32 (never V first), or null:
                                    // the state at the start of every kSegmentTokens tokens
};

struct GatedDeltaRuleBackward : GatedDeltaRuleProblem {
  const float* segment_states = nullptr;  // as the forward wrote them; fp32 kernels require it
  ConstView4 d_o;                         // [B, T, HV, V]
  const void* d_final_state = nullptr;    // [N, HV, K, V] contiguous fp32 (f64: double), or null
  MutableView4 d_q, d_k;                  // [B, T, H, K]
  MutableView4 d_v;                       // [B, T, HV, V]
  void* d_g = nullptr;                    // [B, T, HV] contiguous fp32 (f64: double)
  void* d_beta = nullptr;                 // [B, T, HV] contiguous fp32 (f64: double)
  void* d_initial_state = nullptr;        // [N, HV, K, V] contiguous fp32 (f64: double), or null
};

}  // namespace gdn::kernels
