// How the portable chunked kernels cut a problem: pure host arithmetic, without CUDA.
#pragma once

#include <algorithm>
#include <cstdint>

#include <gdn/kernels/gated_delta_rule.h>

namespace gdn::kernels::cuda {

/// Waves and their groups: waves of one segment each, of `pairs` sequences x key heads at a time.
struct WavePlan {
  int64_t chunks = 0;    // of 64 tokens, in the longest segment
  int64_t segments = 0;  // of the longest sequence; at least 1, for the states of empty ones
  int64_t pairs = 0;     // at once
  int64_t groups = 0;    // of pairs, one after another
};

/// Scratch memory is kept near this: enough to fill the largest GPUs, little beside their memory.
inline constexpr int64_t kScratchGoal = int64_t{1} << 30;

/// `pair_bytes(chunks)`: scratch bytes of one pair. Groups are as large as the goal and the size of
/// a grid allow, and of about one size.
template <typename PairBytes>
WavePlan plan_waves(const GatedDeltaRuleProblem& p, int64_t longest, const PairBytes& pair_bytes) {
  constexpr int64_t kMaxSlots = 65535;  // of a grid's second dimension
  WavePlan plan;
  plan.chunks = (std::min(longest, kSegmentTokens) + 63) / 64;
  plan.segments = std::max<int64_t>(1, (longest + kSegmentTokens - 1) / kSegmentTokens);
  const int64_t total = p.N * p.H;
  if (total == 0) return plan;
  const int64_t fit = kScratchGoal / std::max<int64_t>(1, pair_bytes(plan.chunks));
  const int64_t most = std::clamp<int64_t>(fit, 1, std::max<int64_t>(1, kMaxSlots * p.H / p.HV));
  plan.groups = (total + most - 1) / most;
  plan.pairs = (total + plan.groups - 1) / plan.groups;
  return plan;
}

/// Columns of V that a scan's block owns, divided by 16: the state's columns are to fit its shared
/// memory several times on large GPUs.
inline int scan_tiles(int64_t K) { return K <= 256 ? 4 : K <= 384 ? 2 : 1; }

}  // namespace gdn::kernels::cuda
