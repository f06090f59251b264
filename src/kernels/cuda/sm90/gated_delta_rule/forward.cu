// Host side of the Hopper forward: what it serves, tensor maps, launch.
#include <cuda_runtime.h>
#include <stdexcept>

#include <gdn/kernels/cuda/gated_delta_rule.h>
#include <gdn/kernels/cuda/sm90/gated_delta_rule/launch_split.cuh>

namespace gdn::kernels::cuda {

size_t gated_delta_rule_forward_sm90_scratch(const GatedDeltaRuleForward& p, int64_t longest) {
  return sm90::forward_scratch(p, sm90::plan_forward(p, longest, sm90::multiprocessors()));
}

void gated_delta_rule_forward_sm90(const GatedDeltaRuleForward& p, int64_t longest, void* scratch,
                                   Stream stream) {
  if (const std::string reason = why_not_sm90(p); !reason.empty()) {
    throw std::invalid_argument("gated_delta_rule_forward_sm90: " + reason);
  }
  sm90::run_forward(p, sm90::plan_forward(p, longest, sm90::multiprocessors()), scratch, stream);
}

size_t sm90::forward_scratch(const GatedDeltaRuleProblem& p, const ForwardPlan& plan) {
  return plan.split ? SplitScratch(p, plan).bytes(p, plan) : 0;
}

void sm90::run_forward(const GatedDeltaRuleForward& p, const ForwardPlan& plan, void* scratch,
                       Stream stream) {
  if (p.N == 0 || p.HV == 0) return;
  const bool bf16 = p.dtype == DType::bf16;
  if (plan.split) {
    const auto launch = bf16 ? launch_split<__nv_bfloat16> : launch_split<__half>;
    launch(p, plan, scratch, stream);
  } else {
    const auto launch = bf16 ? launch_forward<__nv_bfloat16> : launch_forward<__half>;
    launch(forward_arguments(p), stream);
  }
}

}  // namespace gdn::kernels::cuda
