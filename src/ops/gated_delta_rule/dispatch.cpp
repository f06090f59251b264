#include <mutex>
#include <unordered_set>

#include <c10/util/Logging.h>

#include <gdn/kernels/reference/gated_delta_rule.h>
#include <gdn/ops/gated_delta_rule/dispatch.h>

namespace gdn {

namespace {

template <typename Real>
KernelChoice reference_kernel(GatedDeltaRulePass pass, const std::string& real,
                              std::string_view reason) {
  namespace reference = kernels::reference;
  switch (pass) {
    case GatedDeltaRulePass::chunk_forward:
      return {.name = "reference::chunk_gated_delta_rule<" + real + ">",
              .reason = reason,
              .forward = reference::chunk_gated_delta_rule<Real>};
    case GatedDeltaRulePass::recurrent_forward:
      return {.name = "reference::recurrent_gated_delta_rule<" + real + ">",
              .reason = reason,
              .forward = reference::recurrent_gated_delta_rule<Real>};
    case GatedDeltaRulePass::backward:
      break;
  }
  return {.name = "reference::chunk_gated_delta_rule_backward<" + real + ">",
          .reason = reason,
          .backward = reference::chunk_gated_delta_rule_backward<Real>};
}

}  // namespace

KernelChoice choose_kernel(GatedDeltaRulePass pass, c10::ScalarType dtype) {
  if (dtype == c10::kDouble) {
    return reference_kernel<double>(pass, "double", "fp64 is for gradient checks");
  }
  return reference_kernel<float>(pass, "float", "no SIMD kernel is compiled in");
}

void log_choice(const KernelChoice& choice) {
  static std::mutex mutex;
  static std::unordered_set<std::string> logged;
  const std::scoped_lock lock(mutex);
  if (logged.insert(choice.name).second)
    LOG(INFO) << "gdn: " << choice.name << ": " << choice.reason;
}

}  // namespace gdn
