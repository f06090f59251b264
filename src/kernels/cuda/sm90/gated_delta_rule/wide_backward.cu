// Host side of the Hopper backward for wide heads: what it serves, scratch memory, launches.
#include <cuda_runtime.h>
#include <stdexcept>

#include <gdn/kernels/cuda/gated_delta_rule.h>
#include <gdn/kernels/cuda/sm90/gated_delta_rule/wide_launch_backward.cuh>

namespace gdn::kernels::cuda {

size_t gated_delta_rule_backward_sm90_wide_scratch(const GatedDeltaRuleBackward& p, int64_t longest,
                                                   size_t scratch_goal) {
  if (p.N == 0 || p.HV == 0) return 0;
  return sm90::WideBackward(p, longest, scratch_goal).scratch_bytes();
}

void gated_delta_rule_backward_sm90_wide(const GatedDeltaRuleBackward& p, int64_t longest,
                                         void* scratch, Stream stream, size_t scratch_goal) {
  if (const std::string reason = why_not_sm90_wide(p); !reason.empty()) {
    throw std::invalid_argument("gated_delta_rule_backward_sm90_wide: " + reason);
  }
  if (p.N == 0 || p.HV == 0) return;
  const auto launch = p.dtype == DType::bf16 ? sm90::launch_wide_backward<__nv_bfloat16>
                                             : sm90::launch_wide_backward<__half>;
  sm90::WideBackward(p, longest, scratch_goal)
      .for_each(scratch, [&](const sm90::WideBackwardArguments& wave) { launch(wave, stream); });
}

}  // namespace gdn::kernels::cuda
