#include <cstdint>

#include <gdn/kernels/cuda/choice.h>
#include <gdn/kernels/cuda/gated_delta_rule.h>

namespace gdn::kernels::cuda {
namespace {

using Kernel = GatedDeltaRuleKernel;

constexpr const char* kForHopper =
    "16-bit heads, K to 128, in chunks of 64 on compute capability 9.0";
constexpr const char* kForWide =
    "16-bit heads, K to 256, in chunks of 64 on compute capability 9.0";
constexpr const char* kNotHopper = "the GPU is not of capability 9.0";

/// Why a portable chunked kernel, and what it multiplies with; `why_not` a Hopper kernel.
std::string for_any(const GatedDeltaRuleProblem& p, ComputeCapability capability,
                    const std::string& why_not) {
  const char* products = p.dtype == DType::f32   ? "fp32 multiply-adds"
                         : capability.major >= 8 ? "tensor cores in TF32"
                                                 : "tensor cores in scaled fp16, 7.5 has no other";
  return std::string("any size, dtype and GPU, ") + products +
         "; not the Hopper kernel: " + why_not;
}

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

/// The request as a Hopper kernel gets it: q and k, where they are to be normalised, as copies.
template <typename Pass>
Pass for_hopper(Pass p) {
  if (p.qk_l2norm) {
    p.q = p.k = {};
    p.qk_l2norm = false;
  }
  return p;
}

/// sm_90a code runs on 9.0 and nothing else.
bool is_hopper(ComputeCapability capability) {
  return capability.major == 9 && capability.minor == 0;
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
  std::string why_not = kNotHopper;
  if (is_hopper(capability)) {
    const GatedDeltaRuleForward on_hopper = for_hopper(p);
    if (why_not_sm90(on_hopper).empty()) {
      return {Kernel::sm90_forward, "cuda::gated_delta_rule_forward_sm90", kForHopper, p.qk_l2norm};
    }
    why_not = why_not_sm90_wide(on_hopper);
    if (why_not.empty()) {
      return {Kernel::sm90_wide_forward, "cuda::gated_delta_rule_forward_sm90_wide", kForWide,
              p.qk_l2norm};
    }
  }
  return {Kernel::chunk_forward, "cuda::chunk_gated_delta_rule", for_any(p, capability, why_not)};
}

GatedDeltaRuleChoice choose_backward(const GatedDeltaRuleBackward& p,
                                     ComputeCapability capability) {
  if (std::string reason = refusal(p, capability); !reason.empty()) {
    return {Kernel::none, "none", std::move(reason)};
  }
  std::string why_not = kNotHopper;
  if (is_hopper(capability)) {
    const GatedDeltaRuleBackward on_hopper = for_hopper(p);
    if (why_not_sm90(on_hopper).empty()) {
      return {Kernel::sm90_backward, "cuda::gated_delta_rule_backward_sm90",
              "16-bit heads, K = V = 128, in chunks of 64 on compute capability 9.0", p.qk_l2norm};
    }
    why_not = why_not_sm90_wide(on_hopper);
    if (why_not.empty()) {
      return {Kernel::sm90_wide_backward, "cuda::gated_delta_rule_backward_sm90_wide", kForWide,
              p.qk_l2norm};
    }
  }
  return {Kernel::backward, "cuda::chunk_gated_delta_rule_backward",
          for_any(p, capability, why_not)};
}

}  // namespace gdn::kernels::cuda
