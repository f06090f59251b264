// Which CUDA kernel serves which request of the gated delta rule: pure host functions, compiled
// without CUDA too.
#pragma once

#include <string>

#include <gdn/kernels/gated_delta_rule.h>

namespace gdn::kernels::cuda {

/// As in 9.0 for Hopper.
struct ComputeCapability {
  int major = 0, minor = 0;
};

enum class GatedDeltaRuleKernel {
  none,
  sm90_forward,
  sm90_wide_forward,
  chunk_forward,
  recurrent_forward,
  sm90_backward,
  sm90_wide_backward,
  backward
};

struct GatedDeltaRuleChoice {
  GatedDeltaRuleKernel kernel = GatedDeltaRuleKernel::none;
  const char* name = "none";
  std::string reason;            // why this one; with `none`, why none can serve the request
  bool normalise_first = false;  // q and k are L2-normalised by a kernel of their own before
};

/// For the recurrent form or the chunked one. Looks at no memory, only at what p says of it.
GatedDeltaRuleChoice choose_forward(const GatedDeltaRuleForward& p, bool recurrent,
                                    ComputeCapability capability);

GatedDeltaRuleChoice choose_backward(const GatedDeltaRuleBackward& p, ComputeCapability capability);

}  // namespace gdn::kernels::cuda
