// How the Hopper backwards keep scratch memory small: in waves, one after another, each of some key
// heads and of a window of every sequence, from the last window to the first. A function of shapes
// and of the number of multiprocessors alone, so that the same problem gives the same bits.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include <gdn/kernels/gated_delta_rule.h>

namespace gdn::kernels::cuda::sm90 {

struct BackwardPlan {
  int64_t key_heads = 0;      // of a wave; the last one may have fewer
  int64_t window_tokens = 0;  // a multiple of kSegmentTokens
  int64_t windows = 0;        // at least 1, for the states of empty sequences
};

/// The plan whose scratch memory is below `goal`, or else the least.
///
/// `bytes(key_heads, window_tokens)`: scratch memory of a wave. `scan_time(key_heads)`: of the scan
/// of all tokens of so many heads, in any unit: fewer heads at a time may leave multiprocessors
/// idle.
///
/// Heads are parted where that costs no time: a window costs a state read and written. Windows cost
/// little otherwise, since the scan follows a sequence one way or the other.
template <typename Bytes, typename Time>
BackwardPlan plan_backward(const GatedDeltaRuleProblem& p, int64_t longest, size_t goal,
                           const Bytes& bytes, const Time& scan_time) {
  const int64_t segments = std::max<int64_t>(1, (longest + kSegmentTokens - 1) / kSegmentTokens);
  const auto plan = [&](int64_t key_heads, int64_t window) {
    return BackwardPlan{key_heads, window * kSegmentTokens, (segments + window - 1) / window};
  };
  const auto fits = [&](int64_t key_heads, int64_t window) {
    return bytes(key_heads, window * kSegmentTokens) <= goal;
  };
  const auto waves = [&](int64_t key_heads) { return (p.H + key_heads - 1) / key_heads; };
  int64_t key_heads = p.H;
  const auto whole = scan_time(p.H);
  for (int64_t parts = 2; parts <= p.H && !fits(key_heads, segments); ++parts) {
    const int64_t part = (p.H + parts - 1) / parts;
    if (scan_time(part) * waves(part) <= whole) key_heads = part;
  }
  int64_t window = segments;
  while (window > 1 && !fits(key_heads, window)) --window;
  while (key_heads > 1 && !fits(key_heads, window)) --key_heads;
  return plan(key_heads, window);
}

}  // namespace gdn::kernels::cuda::sm90
