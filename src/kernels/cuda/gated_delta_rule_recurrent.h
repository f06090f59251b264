// The recurrent form for decoding: more than recurrent_gated_delta_rule() of gated_delta_rule.h,
// and the same kernel.
#pragma once

#include <gdn/kernels/cuda/stream.h>
#include <gdn/kernels/gated_delta_rule.h>

namespace gdn::kernels::cuda {

struct RecurrentGatedDeltaRule : GatedDeltaRuleForward {
  /// [B, T, HV, K, V] contiguous fp32 (V first as the final state), or null: the state after every
  /// token.
  float* token_states = nullptr;

  /// With A_log instead of g and beta: g = -exp(A_log) softplus(a + dt_bias), beta = beta_factor
  /// sigmoid(beta_logits).
  const float* A_log = nullptr;    // [HV]
  const float* dt_bias = nullptr;  // [HV]
  ConstView3 a, beta_logits;       // [B, T, HV], of dtype
  float beta_factor = 1.0F;

  /// The work queued just before has not written the initial state: it may be read while that work
  /// still runs.
  bool overlap = false;
};

void recurrent_gated_delta_rule(const RecurrentGatedDeltaRule& p, Stream stream);

}  // namespace gdn::kernels::cuda
