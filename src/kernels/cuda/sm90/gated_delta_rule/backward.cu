// Host side of the Hopper backward: what it serves, scratch memory, launches.
#include <algorithm>
#include <cuda_runtime.h>
#include <stdexcept>

#include <gdn/kernels/cuda/gated_delta_rule.h>
#include <gdn/kernels/cuda/sm90/gated_delta_rule/launch_backward.cuh>

namespace gdn::kernels::cuda {

size_t gated_delta_rule_backward_sm90_scratch(const GatedDeltaRuleBackward& p, int64_t longest,
                                              size_t scratch_goal) {
  if (p.N == 0 || p.HV == 0) return 0;
  return sm90::NarrowBackward(p, longest, scratch_goal).scratch_bytes();
}

void gated_delta_rule_backward_sm90(const GatedDeltaRuleBackward& p, int64_t longest, void* scratch,
                                    Stream stream, size_t scratch_goal) {
  if (const std::string reason = why_not_sm90(p); !reason.empty()) {
    throw std::invalid_argument("gated_delta_rule_backward_sm90: " + reason);
  }
  if (p.N == 0 || p.HV == 0) return;
  const auto launch =
      p.dtype == DType::bf16 ? sm90::launch_backward<__nv_bfloat16> : sm90::launch_backward<__half>;
  sm90::NarrowBackward(p, longest, scratch_goal)
      .for_each(scratch, [&](const sm90::BackwardArguments& wave) { launch(wave, stream); });
}

}  // namespace gdn::kernels::cuda
