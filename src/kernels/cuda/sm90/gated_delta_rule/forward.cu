// Host side of the Hopper forward: what it serves, tensor maps, launch.
#include <array>
#include <cuda_runtime.h>
#include <stdexcept>
#include <type_traits>

#include <gdn/kernels/cuda/gated_delta_rule.h>
#include <gdn/kernels/cuda/sm90/gated_delta_rule/launch_split.cuh>

namespace gdn::kernels::cuda {
namespace {

/// The plan for the current device. Planning takes up to 0.1 ms of the host, and a model asks for
/// the same one again and again: every thread keeps its last.
const sm90::ForwardPlan& planned(const GatedDeltaRuleProblem& p, int64_t longest) {
  const int multiprocessors = sm90::multiprocessors();
  const std::array asked = {p.B * p.T, p.N, p.H, p.HV, p.V, longest, int64_t{multiprocessors}};
  thread_local std::remove_const_t<decltype(asked)> last = {};
  thread_local sm90::ForwardPlan plan;
  if (asked != last) {
    plan = sm90::plan_forward(p, longest, multiprocessors);
    last = asked;
  }
  return plan;
}

}  // namespace

size_t gated_delta_rule_forward_sm90_scratch(const GatedDeltaRuleForward& p, int64_t longest) {
  return sm90::forward_scratch(p, planned(p, longest));
}

void gated_delta_rule_forward_sm90(const GatedDeltaRuleForward& p, int64_t longest, void* scratch,
                                   Stream stream) {
  if (const std::string reason = why_not_sm90(p); !reason.empty()) {
    throw std::invalid_argument("gated_delta_rule_forward_sm90: " + reason);
  }
  sm90::run_forward(p, planned(p, longest), scratch, stream);
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
