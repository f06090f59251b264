// The L2 norm of queries and keys around a gated delta rule kernel that takes them normalised.
#pragma once

#include <ATen/core/Tensor.h>

#include <gdn/kernels/cuda/stream.h>
#include <gdn/kernels/gated_delta_rule.h>

namespace gdn::cuda {

/// q and k of a problem as normalised, contiguous copies; they must outlive its kernel's launch.
class NormalisedKeys {
 public:
  NormalisedKeys(const kernels::GatedDeltaRuleProblem& p, c10::Device device,
                 kernels::cuda::Stream stream);

  /// Makes p, of the problem given, one that has the copies and wants no norm.
  void replace(kernels::GatedDeltaRuleProblem& p) const;

 private:
  at::Tensor q_, k_;
};

/// p.d_q and p.d_k, which must be contiguous, from gradients with respect to the normalised q and k
/// to those with respect to p.q and p.k, in place.
void through_key_norm(const kernels::GatedDeltaRuleBackward& p, kernels::cuda::Stream stream);

}  // namespace gdn::cuda
