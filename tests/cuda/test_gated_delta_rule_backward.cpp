// The Hopper backward of the gated delta rule against the recurrence in fp64. Needs a GPU.

#include <support/device_backward.h>

#include <gtest/gtest.h>

#include <gdn/kernels/cuda/gated_delta_rule.h>
#include <gdn/kernels/cuda/sm90/gated_delta_rule/forward_plan.h>

namespace gdn::test {
namespace {

using kernels::DType;

const DeviceBackward kKernel = {[](const kernels::GatedDeltaRuleForward& f) {
                                  kernels::cuda::sm90::run_forward(f, {}, nullptr, nullptr);
                                },
                                kernels::cuda::gated_delta_rule_backward_sm90_scratch,
                                kernels::cuda::gated_delta_rule_backward_sm90};

TEST(GatedDeltaRuleBackwardSm90, OneChunk) {
  expect_near_reference(kKernel, hopper_case(1, 64, 1, 1, 1));
}

TEST(GatedDeltaRuleBackwardSm90, LengthsAroundAChunk) {
  for (const int64_t T : {1, 2, 63, 65, 128, 200}) {
    expect_near_reference(kKernel, hopper_case(2, T, 1, 2, 10 + static_cast<uint64_t>(T)));
  }
}

TEST(GatedDeltaRuleBackwardSm90, GroupedHeadsStridesAndStates) {
  for (const bool v_first : {false, true}) {
    auto c = hopper_case(2, 333, 2, 6, 3);
    c.state_v_first = v_first;
    expect_near_reference(kKernel, c, 8);
    c.states = false;
    c.dtype = DType::f16;
    expect_near_reference(kKernel, c);
  }
}

/// More sequences and heads than half the multiprocessors: both halves of V in one block.
TEST(GatedDeltaRuleBackwardSm90, ManyHeads) {
  expect_near_reference(kKernel, hopper_case(3, 70, 8, 32, 2));
}

TEST(GatedDeltaRuleBackwardSm90, PackedSequences) {
  auto c = hopper_case(1, 700, 2, 4, 4);
  c.cu_seqlens = {0, 1, 1, 65, 129, 300, 300, 700};
  expect_near_reference(kKernel, c);
  c = hopper_case(1, 200, 1, 2, 5);
  for (int64_t n = 0; n <= 40; ++n) c.cu_seqlens.push_back(5 * n);
  expect_near_reference(kKernel, c);
}

TEST(GatedDeltaRuleBackwardSm90, StrongAndAbsentDecay) {
  for (const double min_g : {0.0, -3.0, -100.0, -1e6}) {
    auto c = hopper_case(1, 256, 1, 2, 5);
    c.min_g = min_g;
    if (min_g == 0.0) c.max_beta = 0.5;
    expect_near_reference(kKernel, c);
  }
}

TEST(GatedDeltaRuleBackwardSm90, WriteStrengthUpToTwo) {
  auto c = hopper_case(1, 320, 1, 2, 6);
  c.max_beta = 2;
  c.dtype = DType::f16;
  expect_near_reference(kKernel, c);
  c.dtype = DType::bf16;
  expect_near_reference(kKernel, c);
}

TEST(GatedDeltaRuleBackwardSm90, WriteStrengthZero) {
  auto c = hopper_case(1, 192, 1, 2, 6);
  c.max_beta = 0;  // dbeta is not zero
  expect_near_reference(kKernel, c);
}

/// Few heads: the scan cuts these sequences into spans.
TEST(GatedDeltaRuleBackwardSm90, LongSequences) {
  expect_near_reference(kKernel, hopper_case(1, 2500, 1, 2, 7));
  auto c = hopper_case(1, 5000, 1, 1, 8);
  c.cu_seqlens = {0, 0, 1990, 5000};
  c.min_g = -0.05;
  c.state_v_first = true;
  expect_near_reference(kKernel, c);
  c.min_g = -0.001;  // as long a memory as a span
  expect_near_reference(kKernel, c);
}

/// Key heads and segments one at a time; sequences that end in different windows; spans in windows.
TEST(GatedDeltaRuleBackwardSm90, Waves) {
  auto c = hopper_case(2, 1100, 2, 4, 11);
  c.min_g = -0.01;
  expect_near_reference(kKernel.in_waves(), c, 8);
  c = hopper_case(1, 2300, 2, 2, 12);
  c.cu_seqlens = {0, 0, 1040, 1040, 1100, 2300};
  c.min_g = -0.01;
  c.state_v_first = true;
  expect_near_reference(kKernel.in_waves(), c);
}

TEST(GatedDeltaRuleBackwardSm90, NothingLeaksBetweenSequences) {
  expect_nothing_leaks(kKernel, hopper_case(1, 200, 1, 1, 8), 70);
}

TEST(GatedDeltaRuleBackwardSm90, SameBitsOnEveryRun) {
  expect_same_bits(kKernel, hopper_case(4, 1100, 8, 40, 9), 3);
}

TEST(GatedDeltaRuleBackwardSm90, SaysWhatItCannotServe) {
  kernels::GatedDeltaRuleBackward p;
  p.K = p.V = 128;
  p.dtype = DType::bf16;
  EXPECT_NE(kernels::cuda::why_not_sm90(p), "");  // without segment_states
  EXPECT_THROW(kernels::cuda::gated_delta_rule_backward_sm90(p, 0, nullptr, nullptr),
               std::invalid_argument);
}

}  // namespace
}  // namespace gdn::test
