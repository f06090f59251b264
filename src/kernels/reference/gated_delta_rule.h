// The specification of the gated delta rule in plain loops; everything else is compared with it.
#pragma once

#include <gdn/kernels/gated_delta_rule.h>

namespace gdn::kernels::reference {

/// Token by token, computed and accumulated in Real (float or double), whatever problem.dtype is.
template <typename Real>
void recurrent_gated_delta_rule(const GatedDeltaRuleForward& p);

/// By chunks of p.chunk_size tokens, through (I + A) U = diag(beta) (V - diag(exp b) K S).
template <typename Real>
void chunk_gated_delta_rule(const GatedDeltaRuleForward& p);

/// All gradients, token by token: keeps every state of one value head at a time.
template <typename Real>
void recurrent_gated_delta_rule_backward(const GatedDeltaRuleBackward& p);

/// All gradients by chunks, with the formulas of the chunked form.
template <typename Real>
void chunk_gated_delta_rule_backward(const GatedDeltaRuleBackward& p);

}  // namespace gdn::kernels::reference
