// Host side of the Hopper forward: what it serves, tensor maps, launch.
#include <cuda_runtime.h>
#include <stdexcept>

#include <gdn/kernels/cuda/gated_delta_rule.h>
#include <gdn/kernels/cuda/sm90/gated_delta_rule/launch.cuh>

namespace gdn::kernels::cuda {

std::string why_not_sm90_problem(const GatedDeltaRuleProblem& p) {
  if (p.dtype != DType::bf16 && p.dtype != DType::f16) return "q, k, v are not bf16 or fp16";
  if (p.K != 128 || p.V != 128) {
    return "K = " + std::to_string(p.K) + ", V = " + std::to_string(p.V) + ", not 128";
  }
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
  if (p.o.data == nullptr) return "o is required";
  if (!aligned_for_tma(p.o)) return "o and its strides are not multiples of 16 bytes";
  return {};
}

void gated_delta_rule_forward_sm90(const GatedDeltaRuleForward& p, Stream stream) {
  if (const std::string reason = why_not_sm90(p); !reason.empty()) {
    throw std::invalid_argument("gated_delta_rule_forward_sm90: " + reason);
  }
  if (p.N == 0 || p.HV == 0) return;
  const sm90::ForwardArguments arguments = sm90::forward_arguments(p);
  const auto launch =
      p.dtype == DType::bf16 ? sm90::launch_forward<__nv_bfloat16> : sm90::launch_forward<__half>;
  launch(arguments, p.N * p.HV, stream);
}

}  // namespace gdn::kernels::cuda
