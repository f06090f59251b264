// Host side of the Hopper forward for wide heads: what it serves, scratch memory, launch.
#include <cuda_runtime.h>
#include <stdexcept>

#include <gdn/kernels/cuda/gated_delta_rule.h>
#include <gdn/kernels/cuda/sm90/gated_delta_rule/wide_launch.cuh>

namespace gdn::kernels::cuda {

std::string why_not_sm90_wide_problem(const GatedDeltaRuleProblem& p) {
  if (p.dtype != DType::bf16 && p.dtype != DType::f16) return "q, k, v are not bf16 or fp16";
  if (p.K < 8 || p.K > sm90::kWideKeys || p.K % 8 != 0) {
    return "K = " + std::to_string(p.K) + ", not a multiple of 8 up to 256";
  }
  if (p.V < 8 || p.V % 8 != 0) return "V = " + std::to_string(p.V) + ", not a multiple of 8";
  if (p.chunk_size != 64) return "chunk_size = " + std::to_string(p.chunk_size) + ", not 64";
  if (p.qk_l2norm) return "q and k must be normalised beforehand";
  if (p.B * p.T > INT32_MAX) return "B * T is beyond 2^31";
  if (!aligned_for_tma(p.q) || !aligned_for_tma(p.k) || !aligned_for_tma(p.v)) {
    return "q, k, v and their strides are not multiples of 16 bytes";
  }
  return {};
}

std::string why_not_sm90_wide(const GatedDeltaRuleForward& p) {
  if (std::string reason = why_not_sm90_wide_problem(p); !reason.empty()) return reason;
  if (p.o.data == nullptr) return "o is required";
  if (!aligned_for_tma(p.o)) return "o and its strides are not multiples of 16 bytes";
  return {};
}

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
