// Host side of the Hopper forward for wide heads: what it serves, scratch memory, launch.
#include <cuda_runtime.h>
#include <stdexcept>

#include <gdn/kernels/cuda/gated_delta_rule.h>
#include <gdn/kernels/cuda/sm90/gated_delta_rule/wide_launch.cuh>

namespace gdn::kernels::cuda {

size_t gated_delta_rule_forward_sm90_wide_scratch(const GatedDeltaRuleForward& p) {
  return static_cast<size_t>(sm90::wide_entries(p)) * sm90::kWideMatricesBytes;
}

void gated_delta_rule_forward_sm90_wide(const GatedDeltaRuleForward& p, void* scratch,
                                        Stream stream) {
  if (const std::string reason = why_not_sm90_wide(p); !reason.empty()) {
    throw std::invalid_argument("gated_delta_rule_forward_sm90_wide: " + reason);
  }
  if (p.N == 0 || p.HV == 0) return;
  const sm90::WideForwardArguments arguments = sm90::wide_forward_arguments(p, scratch);
  const auto launch = p.dtype == DType::bf16 ? sm90::launch_wide_forward<__nv_bfloat16>
                                             : sm90::launch_wide_forward<__half>;
  launch(p, arguments, stream);
}

}  // namespace gdn::kernels::cuda
