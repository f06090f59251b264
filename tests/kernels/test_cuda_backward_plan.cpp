// How the Hopper backwards divide problems into waves.
#include <gtest/gtest.h>

#include <gdn/kernels/cuda/sm90/gated_delta_rule/backward_plan.h>

namespace gdn::test {
namespace {

using kernels::cuda::sm90::BackwardPlan;
using kernels::cuda::sm90::plan_backward;

constexpr int64_t kTokenBytes = 100;  // a key head

/// Six key heads; `scan_blocks` blocks a head, `places` of them at a time.
BackwardPlan plan(int64_t sequences, int64_t longest, size_t goal, int64_t scan_blocks,
                  int64_t places = 132) {
  kernels::GatedDeltaRuleProblem p;
  p.B = p.N = sequences;
  p.T = longest;
  p.H = p.HV = 6;
  const auto bytes = [&](int64_t key_heads, int64_t window_tokens) {
    return static_cast<size_t>(sequences * std::min(longest, window_tokens) * key_heads *
                               kTokenBytes);
  };
  const auto time = [&](int64_t key_heads) {
    return (key_heads * scan_blocks + places - 1) / places;
  };
  return plan_backward(p, longest, goal, bytes, time);
}

TEST(BackwardPlan, OneWaveWhereItFits) {
  const auto whole = plan(16, 2000, 16 * 2000 * 6 * kTokenBytes, 64);
  EXPECT_EQ(whole.key_heads, 6);
  EXPECT_EQ(whole.window_tokens, 2048);
  EXPECT_EQ(whole.windows, 1);
}

TEST(BackwardPlan, HeadsArePartedWhereNoMultiprocessorIdles) {
  // 384 blocks are three rounds; so are three times 128, but twice 192 are four.
  const auto thirds = plan(16, 2048, 16 * 2048 * 3 * kTokenBytes, 64);
  EXPECT_EQ(thirds.key_heads, 2);
  EXPECT_EQ(thirds.windows, 1);
}

TEST(BackwardPlan, FewHeadsWorkInWindows) {
  const auto windows = plan(1, 32768, 12 * 1024 * 6 * kTokenBytes, 8);
  EXPECT_EQ(windows.key_heads, 6);
  EXPECT_EQ(windows.window_tokens, 12 * 1024);
  EXPECT_EQ(windows.windows, 3);
}

TEST(BackwardPlan, TheGoalComesBeforeTime) {
  const auto least = plan(1, 5000, 1, 8);
  EXPECT_EQ(least.key_heads, 1);
  EXPECT_EQ(least.window_tokens, 1024);
  EXPECT_EQ(least.windows, 5);
}

TEST(BackwardPlan, EmptySequencesHaveAWindow) { EXPECT_EQ(plan(3, 0, 1, 8).windows, 1); }

}  // namespace
}  // namespace gdn::test
