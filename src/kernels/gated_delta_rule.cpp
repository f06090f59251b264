#include <gdn/kernels/gated_delta_rule.h>

namespace gdn::kernels {

int64_t first_segment(const GatedDeltaRuleProblem& problem, int64_t n) {
  const auto segments = [](int64_t tokens) {
    return (tokens + kSegmentTokens - 1) / kSegmentTokens;
  };
  if (problem.cu_seqlens == nullptr) return n * segments(problem.T);
  int64_t first = 0;
  for (int64_t i = 0; i < n; ++i) {
    first += segments(problem.cu_seqlens[i + 1] - problem.cu_seqlens[i]);
  }
  return first;
}

}  // namespace gdn::kernels
