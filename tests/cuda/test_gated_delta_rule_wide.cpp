// The Hopper forward of wide heads against the recurrence in fp64. Needs a GPU. The bound is that
// of test_gated_delta_rule.cpp: the same roundings.

#include <algorithm>
#include <limits>
#include <support/device_forward.h>

#include <gtest/gtest.h>

#include <gdn/kernels/cuda/gated_delta_rule.h>

namespace gdn::test {
namespace {

using kernels::DType;

void forward(const kernels::GatedDeltaRuleForward& p) {
  void* scratch = nullptr;
  check(cudaMalloc(&scratch, kernels::cuda::gated_delta_rule_forward_sm90_wide_scratch(p) + 16));
  kernels::cuda::gated_delta_rule_forward_sm90_wide(p, scratch, nullptr);
  check(cudaDeviceSynchronize());
  cudaFree(scratch);
}

void expect_near_reference(const GatedDeltaRuleCase& c, int64_t gap = 0) {
  expect_near_recurrence(c, forward, 8, gap);
}

GatedDeltaRuleCase wide_case(int64_t K, int64_t V, int64_t B, int64_t T, int64_t H, int64_t HV,
                             uint64_t seed) {
  GatedDeltaRuleCase c = hopper_case(B, T, H, HV, seed);
  c.K = K;
  c.V = V;
  return c;
}

TEST(GatedDeltaRuleSm90Wide, OneChunk) {
  expect_near_reference(wide_case(256, 512, 1, 64, 1, 1, 1));
}

TEST(GatedDeltaRuleSm90Wide, HeadSizes) {
  // Odd and even numbers of slices of V, the last one full or not; K in whole tiles or not.
  constexpr std::pair<int64_t, int64_t> kSizes[] = {{192, 192}, {256, 256}, {136, 200},
                                                    {200, 136}, {64, 64},   {8, 8},
                                                    {96, 192},  {128, 512}, {256, 520}};
  for (const auto& [K, V] : kSizes) {
    expect_near_reference(wide_case(K, V, 1, 150, 1, 2, 2), 8);
  }
}

TEST(GatedDeltaRuleSm90Wide, LengthsAroundAChunk) {
  for (const int64_t T : {1, 2, 63, 64, 65, 127, 128, 200}) {
    expect_near_reference(wide_case(256, 256, 2, T, 1, 1, 10 + static_cast<uint64_t>(T)));
  }
}

TEST(GatedDeltaRuleSm90Wide, GroupedHeadsStridesAndStates) {
  for (const bool v_first : {false, true}) {
    auto c = wide_case(256, 192, 2, 150, 2, 4, 3);
    c.state_v_first = v_first;
    expect_near_reference(c, 8);
    c.states = false;
    c.dtype = DType::f16;
    expect_near_reference(c);
  }
}

TEST(GatedDeltaRuleSm90Wide, PackedSequences) {
  auto c = wide_case(256, 256, 1, 700, 1, 2, 4);
  c.cu_seqlens = {0, 1, 1, 65, 129, 300, 300, 700};
  expect_near_reference(c);
}

TEST(GatedDeltaRuleSm90Wide, StrongAndAbsentDecay) {
  for (const double min_g : {0.0, -3.0, -100.0, -1e6}) {
    auto c = wide_case(256, 128, 1, 256, 1, 2, 5);
    c.min_g = min_g;
    if (min_g == 0.0) c.max_beta = 0.5;
    expect_near_reference(c);
  }
}

TEST(GatedDeltaRuleSm90Wide, WriteStrengthUpToTwo) {
  auto c = wide_case(256, 128, 1, 320, 1, 2, 6);
  c.max_beta = 2;
  c.dtype = DType::f16;
  expect_near_reference(c);
  c.dtype = DType::bf16;
  expect_near_reference(c);
}

// Blocks of two slices, as wherever blocks of one do not all run at once.
TEST(GatedDeltaRuleSm90Wide, MoreHeadsThanMultiprocessors) {
  auto c = wide_case(256, 192, 1, 70, 23, 46, 7);
  expect_near_reference(c);
  c = wide_case(256, 512, 1, 70, 6, 18, 7);
  c.dtype = DType::f16;
  expect_near_reference(c);
  expect_near_reference(wide_case(96, 192, 1, 70, 46, 46, 7));
}

TEST(GatedDeltaRuleSm90Wide, LongSequence) {
  expect_near_reference(wide_case(256, 128, 1, 4100, 1, 1, 8));
}

TEST(GatedDeltaRuleSm90Wide, NothingLeaksBetweenSequences) {
  auto c = wide_case(256, 192, 1, 200, 1, 1, 9);
  c.cu_seqlens = {0, 70, 200};
  auto inputs = random_inputs(c);
  const Results clean = run_on_device(c, inputs, forward);
  const auto poison = [](Values& values, int64_t size) {
    std::fill(values.begin() + 70 * size, values.end(), std::numeric_limits<double>::quiet_NaN());
  };
  poison(inputs.q, c.K);
  poison(inputs.k, c.K);
  poison(inputs.v, c.V);
  const Results poisoned = run_on_device(c, inputs, forward);
  for (size_t i = 0; i < static_cast<size_t>(70 * c.V); ++i) {
    ASSERT_EQ(clean.at("o")[i], poisoned.at("o")[i]) << "at " << i;
  }
  for (size_t i = 0; i < static_cast<size_t>(c.K * c.V); ++i) {
    ASSERT_EQ(clean.at("final_state")[i], poisoned.at("final_state")[i]) << "at " << i;
  }
}

TEST(GatedDeltaRuleSm90Wide, SameBitsOnEveryRun) {
  const auto c = wide_case(256, 512, 2, 200, 6, 12, 10);
  const auto inputs = random_inputs(c);
  const Results first = run_on_device(c, inputs, forward);
  for (int run = 0; run < 3; ++run) expect_same_bits(first, run_on_device(c, inputs, forward));
}

TEST(GatedDeltaRuleSm90Wide, SaysWhatItCannotServe) {
  kernels::GatedDeltaRuleForward p;
  p.K = 264;
  p.V = 512;
  p.dtype = DType::bf16;
  EXPECT_NE(kernels::cuda::why_not_sm90_wide(p), "");
  EXPECT_THROW(kernels::cuda::gated_delta_rule_forward_sm90_wide(p, nullptr, nullptr),
               std::invalid_argument);
}

}  // namespace
}  // namespace gdn::test
