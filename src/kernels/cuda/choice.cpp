#include <cstdint>

#include <gdn/kernels/cuda/choice.h>
#include <gdn/kernels/cuda/gated_delta_rule.h>

namespace gdn::kernels::cuda {
namespace {

using Kernel = GatedDeltaRuleKernel;

constexpr const char* kForHopper = "16-bit heads of 128 in chunks of 64 on compute capability 9.0";
const std::string kForAny = "any size, dtype and GPU; not the Hopper kernel: ";

/// Why no kernel can serve the request; empty if the portable ones can.
std::string refusal(const GatedDeltaRuleProblem& p, ComputeCapability capability) {
  const int version = 10 * capability.major + capability.minor;
  if (version < 75) {
    return "the GPU has compute capability " + std::to_string(capability.major) + "." +
           std::to_string(capability.minor) + ", 7.5 is needed";
  }
  if (p.dtype == DType::f64) return "fp64 is computed on the CPU only";
  if (p.K > kMaxKeySize) {
    return "K = " + std::to_string(p.K) + " is beyond " + std::to_string(kMaxKeySize);
  }
  return {};
}

template <typename Void>
bool aligned_for_tma(const View4<Void>& view) {
  return reinterpret_cast<uintptr_t>(view.data) % 16 == 0 && view.stride_b % 8 == 0 &&
         view.stride_t % 8 == 0 && view.stride_h % 8 == 0;
}

constexpr const char* kNotAligned = " and their strides are not multiples of 16 bytes";

/// Why no Hopper kernel serves the request; empty if that does not rule one out.
std::string why_not_hopper(const GatedDeltaRuleProblem& p, ComputeCapability capability) {
  // sm_90a code runs on 9.0 and nothing else.
  if (capability.major != 9 || capability.minor != 0) return "the GPU is not of capability 9.0";
  if (p.dtype != DType::bf16 && p.dtype != DType::f16) return "q, k, v are not bf16 or fp16";
  if (p.K != 128 || p.V != 128) {
    return "K = " + std::to_string(p.K) + ", V = " + std::to_string(p.V) + ", not 128";
  }
  if (p.chunk_size != 64) return "chunk_size = " + std::to_string(p.chunk_size) + ", not 64";
  if (p.B * p.T > INT32_MAX) return "B * T is beyond 2^31";
  // Normalised q and k are copies, and aligned.
  const bool keys = p.qk_l2norm || (aligned_for_tma(p.q) && aligned_for_tma(p.k));
  if (!keys || !aligned_for_tma(p.v)) return std::string("q, k, v") + kNotAligned;
  return {};
}

std::string why_not_hopper(const GatedDeltaRuleForward& p, ComputeCapability capability) {
  const GatedDeltaRuleProblem& problem = p;
  if (std::string reason = why_not_hopper(problem, capability); !reason.empty()) return reason;
  if (p.o.data == nullptr) return "only the states are wanted";
  if (!aligned_for_tma(p.o)) return std::string("o") + kNotAligned;
  return {};
}

std::string why_not_hopper(const GatedDeltaRuleBackward& p, ComputeCapability capability) {
  const GatedDeltaRuleProblem& problem = p;
  if (std::string reason = why_not_hopper(problem, capability); !reason.empty()) return reason;
  if (!aligned_for_tma(p.d_o) || !aligned_for_tma(p.d_q) || !aligned_for_tma(p.d_k) ||
      !aligned_for_tma(p.d_v)) {
    return std::string("d_o, d_q, d_k, d_v") + kNotAligned;
  }
  return {};
}

}  // namespace

GatedDeltaRuleChoice choose_forward(const GatedDeltaRuleForward& p, bool recurrent,
                                    ComputeCapability capability) {
  if (std::string reason = refusal(p, capability); !reason.empty()) {
    return {Kernel::none, "none", std::move(reason)};
  }
  if (recurrent) {
    return {Kernel::recurrent_forward, "cuda::recurrent_gated_delta_rule",
            "the recurrent form has one kernel, for any GPU"};
  }
  const std::string why_not = why_not_hopper(p, capability);
  if (why_not.empty()) {
    return {Kernel::sm90_forward, "cuda::gated_delta_rule_forward_sm90", kForHopper, p.qk_l2norm};
  }
  return {Kernel::chunk_forward, "cuda::chunk_gated_delta_rule", kForAny + why_not};
}

GatedDeltaRuleChoice choose_backward(const GatedDeltaRuleBackward& p,
                                     ComputeCapability capability) {
  if (std::string reason = refusal(p, capability); !reason.empty()) {
    return {Kernel::none, "none", std::move(reason)};
  }
  const std::string why_not = why_not_hopper(p, capability);
  if (why_not.empty()) {
    return {Kernel::sm90_backward, "cuda::gated_delta_rule_backward_sm90", kForHopper, p.qk_l2norm};
  }
  return {Kernel::backward, "cuda::chunk_gated_delta_rule_backward", kForAny + why_not};
}

}  // namespace gdn::kernels::cuda
