// How the Hopper forward divides problems over a GPU of 132 multiprocessors.
#include <algorithm>

#include <gtest/gtest.h>

#include <gdn/kernels/cuda/sm90/gated_delta_rule/forward_plan.h>

namespace gdn::test {
namespace {

using kernels::cuda::sm90::ForwardCost;
using kernels::cuda::sm90::ForwardPlan;
using kernels::cuda::sm90::plan_forward;
using kernels::cuda::sm90::Queue;

constexpr int kMultiprocessors = 132;

kernels::GatedDeltaRuleProblem problem(int64_t heads, int64_t sequences, int64_t tokens) {
  kernels::GatedDeltaRuleProblem p;
  p.B = 1;
  p.T = tokens;
  p.H = std::max<int64_t>(1, heads / 4);
  p.HV = heads;
  p.K = p.V = 128;
  p.N = sequences;
  return p;
}

TEST(ForwardPlan, AFullDeviceTakesOneKernel) {
  for (const int64_t sequences : {4, 8}) {
    EXPECT_FALSE(
        plan_forward(problem(64, sequences, 32768), 32768 / sequences, kMultiprocessors).split);
  }
}

TEST(ForwardPlan, HalvesOfVFillTwiceAsManyMultiprocessors) {
  const auto plan = plan_forward(problem(64, 1, 8192), 8192, kMultiprocessors);
  EXPECT_TRUE(plan.split);
  EXPECT_EQ(plan.span_chunks, 0);
  EXPECT_EQ(plan.output_halves, 1);
}

TEST(ForwardPlan, FewHeadsCutALongSequenceIntoSpansThatFillTheDevice) {
  const auto p = problem(8, 1, 32768);
  const auto plan = plan_forward(p, 32768, kMultiprocessors);
  ASSERT_GT(plan.span_chunks, 0);
  const int64_t spans = (512 + plan.span_chunks - 1) / plan.span_chunks;
  EXPECT_GE(spans, 4);
  const ForwardCost cost(p, 32768, kMultiprocessors);
  EXPECT_LT(cost.of(plan), cost.of(ForwardPlan{}) / 2);
}

TEST(ForwardPlan, SpansThatFillTheDeviceMakeTheirOwnMatrices) {
  const auto p = problem(32, 1, 32768);
  const auto plan = plan_forward(p, 32768, kMultiprocessors);
  EXPECT_GT(plan.span_chunks, 0);
  EXPECT_TRUE(plan.fused_outputs);
  ForwardPlan apart = plan;
  apart.fused_outputs = false;
  const ForwardCost cost(p, 32768, kMultiprocessors);
  EXPECT_LT(cost.of(plan), cost.of(apart));
}

TEST(ForwardPlan, FusedPlansCoverTheLongestSequence) {
  const auto p = problem(32, 2, 32768);
  const ForwardCost cost(p, 28672, kMultiprocessors);
  for (const int64_t later : {2, 3, 4, 7}) {
    int64_t first = 0;
    for (const int64_t ends : {2, 3, 4}) {
      const auto plan = cost.fused_plan(later, ends);
      EXPECT_GE(plan.lead_chunks, 0);
      EXPECT_GE(plan.lead_chunks + (later + 1) * plan.span_chunks, 448);
      EXPECT_LT(plan.lead_chunks + later * plan.span_chunks, 448);
      // The more ends are found beside them, the longer are first spans.
      EXPECT_GT(plan.lead_chunks + plan.span_chunks, first);
      first = plan.lead_chunks + plan.span_chunks;
    }
  }
}

TEST(ForwardPlan, TheFirstMultiprocessorThatIsFreeTakesTheNextBlock) {
  Queue queue(2);
  queue.add(1, 5);
  EXPECT_EQ(queue.end(), 5);
  queue.add(3, 2);
  EXPECT_EQ(queue.end(), 6);
  queue.add(1, 0.5);
  EXPECT_EQ(queue.end(), 6);
}

TEST(ForwardPlan, MatricesMakeEvenRounds) {
  const ForwardCost cost(problem(32, 1, 32768), 32768, kMultiprocessors);
  EXPECT_EQ(cost.matrix_chunks(264, 12), 12);  // one block a place
  EXPECT_EQ(cost.matrix_chunks(96, 103), 13);  // 768 blocks, 2.9 rounds; by 16 2.5 of 3
}

TEST(ForwardPlan, ShortSequencesAreNotCut) {
  for (const int64_t tokens : {1, 64, 128}) {
    EXPECT_EQ(plan_forward(problem(1, 1, tokens), tokens, kMultiprocessors).span_chunks, 0);
  }
}

TEST(ForwardPlan, TheLongestSequenceDecides) {
  // 32 sequences of 1,024 tokens fill the device with 4 heads; one of 31,775 and 31 of a few do
  // not.
  const auto p = problem(4, 32, 32768);
  EXPECT_EQ(plan_forward(p, 1024, kMultiprocessors).span_chunks, 0);
  EXPECT_GT(plan_forward(p, 31775, kMultiprocessors).span_chunks, 0);
}

TEST(ForwardPlan, NothingToDo) {
  EXPECT_EQ(plan_forward(problem(8, 1, 0), 0, kMultiprocessors).span_chunks, 0);
  EXPECT_EQ(plan_forward(problem(8, 3, 0), 0, kMultiprocessors).span_chunks, 0);
}

}  // namespace
}  // namespace gdn::test
