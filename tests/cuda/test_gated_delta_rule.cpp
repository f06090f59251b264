// The Hopper forward of the gated delta rule against the recurrence in fp64. Needs a GPU.
//
// Bound on the relative error of whole tensors: a value passes through at most six roundings to the
// operands' dtype (S, R, T or P, U, decayed U, O), each of relative size 2^-9 (bf16) or 2^-12
// (fp16), and the inverse adds three of fp16: together under 8 units.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <support/device_forward.h>
#include <vector>

#include <gtest/gtest.h>

#include <gdn/kernels/cuda/gated_delta_rule.h>
#include <gdn/kernels/cuda/sm90/gated_delta_rule/forward_plan.h>

namespace gdn::test {
namespace {

using kernels::DType;
using kernels::cuda::sm90::ForwardPlan;

int64_t longest_sequence(const GatedDeltaRuleCase& c) {
  int64_t longest = c.cu_seqlens.empty() ? c.T : 0;
  for (size_t n = 1; n < c.cu_seqlens.size(); ++n) {
    longest = std::max(longest, c.cu_seqlens[n] - c.cu_seqlens[n - 1]);
  }
  return longest;
}

std::string describe(const ForwardPlan& plan) {
  if (!plan.split) return "one kernel";
  return "spans of " + std::to_string(plan.span_chunks) + " chunks, " +
         (plan.fused_outputs ? "fused, the first longer by " + std::to_string(plan.lead_chunks)
                             : "halves " + std::to_string(plan.end_halves) + " and " +
                                   std::to_string(plan.output_halves)) +
         ", matrices by " + std::to_string(plan.matrix_chunks);
}

/// By `plan` if one is given, else as the device and the shape ask for.
Results run_device(const GatedDeltaRuleCase& c, const GatedDeltaRuleInputs& inputs, int64_t gap = 0,
                   std::optional<ForwardPlan> plan = std::nullopt) {
  const auto forward = [&](const kernels::GatedDeltaRuleForward& p) {
    const size_t bytes =
        plan ? kernels::cuda::sm90::forward_scratch(p, *plan)
             : kernels::cuda::gated_delta_rule_forward_sm90_scratch(p, longest_sequence(c));
    void* scratch = nullptr;
    check(cudaMalloc(&scratch, bytes + 16));
    check(cudaMemset(scratch, 0xff, bytes));  // NaN
    if (plan) {
      kernels::cuda::sm90::run_forward(p, *plan, scratch, nullptr);
    } else {
      kernels::cuda::gated_delta_rule_forward_sm90(p, longest_sequence(c), scratch, nullptr);
    }
    check(cudaDeviceSynchronize());
    cudaFree(scratch);
  };
  return run_on_device(c, inputs, forward, gap);
}

void expect_near_reference(const GatedDeltaRuleCase& c, int64_t gap = 0,
                           const std::vector<std::optional<ForwardPlan>>& plans = {std::nullopt}) {
  SCOPED_TRACE(testing::PrintToString(c));
  const GatedDeltaRuleInputs inputs = random_inputs(c);
  const Results want = forward_reference(c, inputs);
  const double bound = 8 * std::ldexp(1.0, c.dtype == DType::bf16 ? -9 : -12);
  for (const auto& plan : plans) {
    if (plan) std::printf("    %s\n", describe(*plan).c_str());
    SCOPED_TRACE(plan ? describe(*plan) : "the device's plan");
    const Results got = run_device(c, inputs, gap, plan);
    for (const auto& [name, values] : want) {
      ASSERT_EQ(got.at(name).size(), values.size()) << name;
      const double error = relative_error(got.at(name), values);
      EXPECT_LE(error, bound) << name;  // false for NaN
      std::printf("    %-14s relative error %.2e\n", name.c_str(), error);
    }
  }
}

TEST(GatedDeltaRuleSm90, OneChunk) { expect_near_reference(hopper_case(1, 64, 1, 1, 1)); }

TEST(GatedDeltaRuleSm90, LengthsAroundAChunk) {
  for (const int64_t T : {1, 2, 63, 64, 65, 127, 128, 200}) {
    expect_near_reference(hopper_case(2, T, 1, 2, 10 + static_cast<uint64_t>(T)));
  }
}

TEST(GatedDeltaRuleSm90, GroupedHeadsStridesAndStates) {
  for (const bool v_first : {false, true}) {
    auto c = hopper_case(2, 333, 2, 6, 3);
    c.state_v_first = v_first;
    expect_near_reference(c, 8);
    c.states = false;
    c.dtype = DType::f16;
    expect_near_reference(c);
  }
}

TEST(GatedDeltaRuleSm90, PackedSequences) {
  auto c = hopper_case(1, 700, 2, 4, 4);
  c.cu_seqlens = {0, 1, 1, 65, 129, 300, 300, 700};
  expect_near_reference(c);
}

TEST(GatedDeltaRuleSm90, StrongAndAbsentDecay) {
  for (const double min_g : {0.0, -3.0, -100.0, -1e6}) {
    auto c = hopper_case(1, 256, 1, 2, 5);
    c.min_g = min_g;
    if (min_g == 0.0) c.max_beta = 0.5;
    expect_near_reference(c);
  }
}

TEST(GatedDeltaRuleSm90, WriteStrengthUpToTwo) {
  auto c = hopper_case(1, 320, 1, 2, 6);
  c.max_beta = 2;
  c.dtype = DType::f16;
  expect_near_reference(c);
  c.dtype = DType::bf16;
  expect_near_reference(c);
}

TEST(GatedDeltaRuleSm90, LongSequence) { expect_near_reference(hopper_case(1, 4100, 1, 2, 7)); }

/// One kernel, whole sequences and spans, in blocks of 64 and of 128 of V's columns.
const std::vector<std::optional<ForwardPlan>> kEveryPlan = {
    ForwardPlan{},
    ForwardPlan{.split = true, .output_halves = 1, .matrix_chunks = 2},
    ForwardPlan{.split = true, .output_halves = 2, .matrix_chunks = 1},
    ForwardPlan{.split = true, .span_chunks = 1, .end_halves = 1, .output_halves = 2},
    ForwardPlan{.split = true, .span_chunks = 2, .end_halves = 2, .output_halves = 1},
    ForwardPlan{.split = true, .span_chunks = 3, .end_halves = 2, .output_halves = 2},
    ForwardPlan{.split = true, .span_chunks = 100},
    ForwardPlan{.split = true, .span_chunks = 1, .fused_outputs = true},
    ForwardPlan{.split = true, .span_chunks = 3, .fused_outputs = true, .matrix_chunks = 2},
    ForwardPlan{.split = true, .span_chunks = 1, .fused_outputs = true, .lead_chunks = 3},
    ForwardPlan{.split = true,
                .span_chunks = 2,
                .fused_outputs = true,
                .lead_chunks = 1,
                .matrix_chunks = 1},
    ForwardPlan{.split = true, .span_chunks = 100, .fused_outputs = true},
};

TEST(GatedDeltaRuleSm90, EveryPlanOneSequence) {
  expect_near_reference(hopper_case(1, 700, 1, 2, 20), 0, kEveryPlan);
}

TEST(GatedDeltaRuleSm90, EveryPlanBatchStridesAndStates) {
  auto c = hopper_case(2, 500, 2, 6, 21);
  c.dtype = DType::f16;
  c.state_v_first = true;
  expect_near_reference(c, 8, kEveryPlan);
  c.states = false;
  expect_near_reference(c, 8, kEveryPlan);
}

TEST(GatedDeltaRuleSm90, EveryPlanPackedSequences) {
  auto c = hopper_case(1, 1000, 1, 2, 22);
  c.cu_seqlens = {0, 0, 1, 65, 700, 700, 892, 1000, 1000};
  expect_near_reference(c, 0, kEveryPlan);
}

TEST(GatedDeltaRuleSm90, EveryPlanStrongAndAbsentDecay) {
  for (const double min_g : {0.0, -100.0, -1e6}) {
    auto c = hopper_case(1, 448, 1, 1, 23);
    c.min_g = min_g;
    if (min_g == 0.0) c.max_beta = 0.5;
    expect_near_reference(c, 0, kEveryPlan);
  }
}

TEST(GatedDeltaRuleSm90, SegmentStatesOfSpans) {
  // Spans whose lengths divide a segment, or do not.
  const std::vector<std::optional<ForwardPlan>> plans = {
      ForwardPlan{.split = true, .span_chunks = 5}, ForwardPlan{.split = true, .span_chunks = 16},
      ForwardPlan{.split = true, .span_chunks = 21, .end_halves = 1, .output_halves = 1},
      ForwardPlan{.split = true, .span_chunks = 5, .fused_outputs = true, .lead_chunks = 12}};
  auto c = hopper_case(1, 4400, 1, 1, 24);
  c.cu_seqlens = {0, 3300, 4400};
  expect_near_reference(c, 0, plans);
}

TEST(GatedDeltaRuleSm90, OtherSizes) {
  const std::vector<std::optional<ForwardPlan>> plans = {
      ForwardPlan{}, ForwardPlan{.split = true, .output_halves = 1},
      ForwardPlan{.split = true, .span_chunks = 2, .end_halves = 1, .output_halves = 2},
      ForwardPlan{.split = true, .span_chunks = 1, .end_halves = 2, .output_halves = 1},
      ForwardPlan{.split = true, .span_chunks = 1, .fused_outputs = true, .lead_chunks = 1}};
  const int64_t sizes[][2] = {{64, 64}, {96, 96}, {8, 8}, {128, 256}, {40, 136}, {128, 64}};
  for (const auto& [K, V] : sizes) {
    for (const bool v_first : {false, true}) {
      auto c = hopper_case(1, 300, 1, 2, 25);
      c.K = K;
      c.V = V;
      c.state_v_first = v_first;
      c.cu_seqlens = {0, 230, 230, 300};
      expect_near_reference(c, 8, plans);
    }
  }
}

TEST(GatedDeltaRuleSm90, NothingLeaksBetweenSequences) {
  auto c = hopper_case(1, 200, 1, 1, 8);
  c.cu_seqlens = {0, 70, 200};
  auto inputs = random_inputs(c);
  const Results clean = run_device(c, inputs);
  for (Values* values : {&inputs.q, &inputs.k, &inputs.v}) {
    std::fill(values->begin() + 70 * 128, values->end(), std::numeric_limits<double>::quiet_NaN());
  }
  const Results poisoned = run_device(c, inputs);
  for (size_t i = 0; i < 70 * 128; ++i) {
    ASSERT_EQ(clean.at("o")[i], poisoned.at("o")[i]) << "at " << i;
  }
  for (size_t i = 0; i < 128 * 128; ++i) {
    ASSERT_EQ(clean.at("final_state")[i], poisoned.at("final_state")[i]) << "at " << i;
  }
}

void expect_same_bits_on_every_run(const GatedDeltaRuleCase& c, std::optional<ForwardPlan> plan) {
  const auto inputs = random_inputs(c);
  const Results first = run_device(c, inputs, 0, plan);
  for (int run = 0; run < 3; ++run) {
    const Results again = run_device(c, inputs, 0, plan);
    for (const auto& [name, values] : first) {
      EXPECT_EQ(std::memcmp(values.data(), again.at(name).data(), values.size() * sizeof(double)),
                0)
          << name;
    }
  }
}

TEST(GatedDeltaRuleSm90, SameBitsOnEveryRun) {
  expect_same_bits_on_every_run(hopper_case(2, 500, 8, 40, 9), ForwardPlan{});
  expect_same_bits_on_every_run(hopper_case(1, 1000, 8, 40, 9),
                                ForwardPlan{.split = true, .output_halves = 1});
  expect_same_bits_on_every_run(hopper_case(1, 2000, 2, 8, 9),
                                ForwardPlan{.split = true, .span_chunks = 4});
  expect_same_bits_on_every_run(
      hopper_case(1, 2000, 2, 8, 9),
      ForwardPlan{.split = true, .span_chunks = 4, .fused_outputs = true, .lead_chunks = 2});
}

TEST(GatedDeltaRuleSm90, SaysWhatItCannotServe) {
  kernels::GatedDeltaRuleForward p;
  p.K = 136;
  p.V = 128;
  p.dtype = DType::bf16;
  EXPECT_NE(kernels::cuda::why_not_sm90(p).find("K = 136"), std::string::npos);
  EXPECT_THROW(kernels::cuda::gated_delta_rule_forward_sm90(p, 0, nullptr, nullptr),
               std::invalid_argument);
}

}  // namespace
}  // namespace gdn::test
