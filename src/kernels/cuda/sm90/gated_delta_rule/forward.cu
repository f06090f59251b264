// Host side of the Hopper forward: what it serves, tensor maps, launch.
#include <cuda_runtime.h>
#include <stdexcept>

#include <gdn/kernels/cuda/gated_delta_rule.h>
#include <gdn/kernels/cuda/sm90/gated_delta_rule/launch_split.cuh>

namespace gdn::kernels::cuda {

std::string why_not_sm90_problem(const GatedDeltaRuleProblem& p) {
  if (p.dtype != DType::bf16 && p.dtype != DType::f16) return "q, k, v are not bf16 or fp16";
  if (p.chunk_size != 64) return "chunk_size = " + std::to_string(p.chunk_size) + ", not 64";
  if (p.qk_l2norm) return "q and k must be normalised beforehand";
  if (p.B * p.T > INT32_MAX) return "B * T is beyond 2^31";
  if (!aligned_for_tma(p.q) || !aligned_for_tma(p.k) || !aligned_for_tma(p.v)) {
    return "q, k, v and their strides are not multiples of 16 bytes";
  }
  return {};
}

std::string why_not_sm90(const GatedDeltaRuleForward& p) {
  if (std::string reason = why_not_sm90_problem(p); !reason.empty()) return reason;
  // The copy engine moves whole pieces of 16 bytes.
  if (p.K < 8 || p.K > 128 || p.K % 8 != 0) {
    return "K = " + std::to_string(p.K) + ", not a multiple of 8 up to 128";
  }
  if (p.V < 8 || p.V % 8 != 0) return "V = " + std::to_string(p.V) + ", not a multiple of 8";
  if (p.o.data == nullptr) return "o is required";
  if (!aligned_for_tma(p.o)) return "o and its strides are not multiples of 16 bytes";
  return {};
}

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
