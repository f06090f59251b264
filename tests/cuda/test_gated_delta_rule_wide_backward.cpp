// The Hopper backward of wide heads against the recurrence in fp64. Needs a GPU.

#include <support/device_backward.h>

#include <gtest/gtest.h>

#include <gdn/kernels/cuda/gated_delta_rule.h>

namespace gdn::test {
namespace {

using kernels::DType;

const DeviceBackward kKernel = {
    [](const kernels::GatedDeltaRuleForward& f) {
      void* scratch = nullptr;
      check(
          cudaMalloc(&scratch, kernels::cuda::gated_delta_rule_forward_sm90_wide_scratch(f) + 16));
      kernels::cuda::gated_delta_rule_forward_sm90_wide(f, scratch, nullptr);
      cudaFree(scratch);
    },
    kernels::cuda::gated_delta_rule_backward_sm90_wide_scratch,
    kernels::cuda::gated_delta_rule_backward_sm90_wide};

GatedDeltaRuleCase wide_case(int64_t B, int64_t T, int64_t H, int64_t HV, int64_t K, int64_t V,
                             uint64_t seed) {
  auto c = hopper_case(B, T, H, HV, seed);
  c.K = K;
  c.V = V;
  return c;
}

TEST(GatedDeltaRuleWideBackwardSm90, OneChunk) {
  expect_near_reference(kKernel, wide_case(1, 64, 1, 1, 256, 512, 1));
}

TEST(GatedDeltaRuleWideBackwardSm90, LengthsAroundAChunk) {
  for (const int64_t T : {1, 63, 65, 128, 200}) {
    expect_near_reference(kKernel, wide_case(1, T, 1, 1, 256, 128, 10 + static_cast<uint64_t>(T)));
  }
}

/// K and V that fill no tile, an odd number of slices of V, the least V.
TEST(GatedDeltaRuleWideBackwardSm90, Sizes) {
  for (const auto& [K, V] : std::vector<std::array<int64_t, 2>>{
           {192, 192}, {256, 256}, {136, 320}, {200, 8}, {248, 72}, {64, 256}}) {
    expect_near_reference(kKernel, wide_case(1, 150, 1, 2, K, V, static_cast<uint64_t>(K + V)));
  }
}

TEST(GatedDeltaRuleWideBackwardSm90, GroupedHeadsStridesAndStates) {
  for (const bool v_first : {false, true}) {
    auto c = wide_case(2, 140, 2, 6, 192, 128, 3);
    c.state_v_first = v_first;
    expect_near_reference(kKernel, c, 8);
    c.states = false;
    c.dtype = DType::f16;
    expect_near_reference(kKernel, c);
  }
}

/// More slices than multiprocessors: two of them in a block.
TEST(GatedDeltaRuleWideBackwardSm90, ManyHeads) {
  expect_near_reference(kKernel, wide_case(3, 66, 3, 6, 256, 512, 2));
}

TEST(GatedDeltaRuleWideBackwardSm90, PackedSequences) {
  auto c = wide_case(1, 500, 1, 2, 256, 192, 4);
  c.cu_seqlens = {0, 1, 1, 65, 129, 260, 260, 500};
  expect_near_reference(kKernel, c);
  c = wide_case(1, 150, 1, 2, 256, 64, 5);
  for (int64_t n = 0; n <= 30; ++n) c.cu_seqlens.push_back(5 * n);
  expect_near_reference(kKernel, c);
}

TEST(GatedDeltaRuleWideBackwardSm90, StrongAndAbsentDecay) {
  for (const double min_g : {0.0, -3.0, -100.0, -1e6}) {
    auto c = wide_case(1, 256, 1, 1, 256, 256, 5);
    c.min_g = min_g;
    if (min_g == 0.0) c.max_beta = 0.5;
    expect_near_reference(kKernel, c);
  }
}

TEST(GatedDeltaRuleWideBackwardSm90, WriteStrengths) {
  for (const double max_beta : {0.0, 2.0}) {  // at 0 dbeta is not zero
    auto c = wide_case(1, 256, 1, 1, 256, 256, 6);
    c.max_beta = max_beta;
    expect_near_reference(kKernel, c);
    c.dtype = DType::f16;
    expect_near_reference(kKernel, c);
  }
}

/// More than a segment.
TEST(GatedDeltaRuleWideBackwardSm90, LongSequence) {
  expect_near_reference(kKernel, wide_case(1, 1200, 1, 1, 256, 128, 7));
}

/// Key heads and segments one at a time; sequences that end in different windows.
TEST(GatedDeltaRuleWideBackwardSm90, Waves) {
  auto c = wide_case(1, 1100, 2, 4, 256, 136, 11);
  c.min_g = -0.01;
  expect_near_reference(kKernel.in_waves(), c, 8);
  c = wide_case(1, 2300, 1, 1, 192, 128, 12);
  c.cu_seqlens = {0, 0, 1040, 1040, 1100, 2300};
  c.min_g = -0.01;
  c.state_v_first = true;
  expect_near_reference(kKernel.in_waves(), c);
}

TEST(GatedDeltaRuleWideBackwardSm90, NothingLeaksBetweenSequences) {
  expect_nothing_leaks(kKernel, wide_case(1, 200, 1, 1, 256, 128, 8), 70);
}

TEST(GatedDeltaRuleWideBackwardSm90, SameBitsOnEveryRun) {
  expect_same_bits(kKernel, wide_case(3, 200, 3, 6, 256, 512, 9), 2);
}

TEST(GatedDeltaRuleWideBackwardSm90, SaysWhatItCannotServe) {
  kernels::GatedDeltaRuleBackward p;
  p.K = 256;
  p.V = 512;
  p.dtype = DType::bf16;
  EXPECT_NE(kernels::cuda::why_not_sm90_wide(p), "");  // without segment_states
  EXPECT_THROW(kernels::cuda::gated_delta_rule_backward_sm90_wide(p, 0, nullptr, nullptr),
               std::invalid_argument);
}

}  // namespace
}  // namespace gdn::test
