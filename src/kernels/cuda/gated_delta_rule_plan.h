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

/// Shared memory that a block may have on compute capability 7.5, the least of all: 8.0 has 163 KB,
/// 8.6 and 12.0 have 99, 9.0 has 227.
inline constexpr int64_t kLeastSharedBytes = 64 << 10;

/// Floats between the rows of a scan's 16 `tiles` columns of V; see gated_delta_rule_tiles.cuh.
constexpr int scan_stride(int tiles) {
  return tiles == 1 ? 20 : tiles * 16 + 8;  // 20 shares banks, but lets K = 512 fit into 64 KB
}

/// Shared memory of a scan's block: the state with K rounded up to 64, 64 tokens, a stage of 64 x
/// 36 and 7 numbers of each token's gates.
constexpr int64_t scan_bytes(int64_t K, int tiles) {
  const int64_t rows = (K + 63) / 64 * 64 + 64;
  return (rows * scan_stride(tiles) + 64 * 36 + 7 * 64 + 1) * 4;
}

/// Columns of V that a scan's block owns, divided by 16: the state's columns are to fit the shared
/// memory of large GPUs several times, and that of a block, `shared_bytes`, once.
inline int scan_tiles(int64_t K, int64_t shared_bytes) {
  int tiles = K <= 256 ? 4 : K <= 384 ? 2 : 1;
  while (tiles > 1 && scan_bytes(K, tiles) > shared_bytes) tiles /= 2;
  return tiles;
}

}  // namespace gdn::kernels::cuda
