// The specification against itself: two independently written forms, and finite differences.
#include <limits>
#include <support/compare.h>
#include <support/gated_delta_rule_case.h>
#include <support/numerical_gradient.h>

#include <gtest/gtest.h>

#include <gdn/kernels/reference/gated_delta_rule.h>

namespace gdn::test {
namespace {

namespace reference = kernels::reference;
using Case = GatedDeltaRuleCase;

Results recurrent(const Case& c, const GatedDeltaRuleInputs& inputs) {
  return run(c, inputs, reference::recurrent_gated_delta_rule<double>,
             reference::recurrent_gated_delta_rule_backward<double>);
}

Results chunked(const Case& c, const GatedDeltaRuleInputs& inputs) {
  return run(c, inputs, reference::chunk_gated_delta_rule<double>,
             reference::chunk_gated_delta_rule_backward<double>);
}

// A result adds up at most T (K + V) products of numbers of about its own size; the random signs of
// their rounding errors leave far less than this bound.
double rounding(const Case& c, double epsilon = std::numeric_limits<double>::epsilon()) {
  return epsilon * static_cast<double>(c.T * (c.K + c.V) + 16);
}

class ReferenceGatedDeltaRule : public testing::TestWithParam<Case> {};

TEST_P(ReferenceGatedDeltaRule, ChunkedEqualsRecurrent) {
  const Case& c = GetParam();
  const GatedDeltaRuleInputs inputs = random_inputs(c);
  expect_close(chunked(c, inputs), recurrent(c, inputs), rounding(c));
}

INSTANTIATE_TEST_SUITE_P(
    Shapes, ReferenceGatedDeltaRule,
    testing::Values(
        Case{.T = 0}, Case{.T = 1}, Case{.T = 15}, Case{.T = 16}, Case{.T = 17},
        Case{.T = 70, .chunk_size = 32}, Case{.T = 70, .chunk_size = 64},
        Case{.T = 130, .chunk_size = 128}, Case{.B = 3, .T = 21, .H = 2, .HV = 2, .K = 5, .V = 3},
        Case{.B = 2, .T = 33, .H = 2, .HV = 6, .K = 3, .V = 8},
        Case{.B = 2, .T = 20, .H = 1, .HV = 4, .qk_l2norm = true, .state_v_first = true},
        Case{.T = 40, .H = 2, .HV = 4, .cu_seqlens = {0, 0, 7, 24, 24, 39, 40, 40}},
        Case{.T = 40, .cu_seqlens = {0, 18, 40}, .qk_l2norm = true, .states = false},
        Case{.B = 2, .T = 20, .states = false},
        Case{.T = 2050, .K = 2, .V = 2, .chunk_size = 128},  // three segments
        Case{.T = 2050, .K = 2, .V = 2, .cu_seqlens = {0, 1025, 2050}}, Case{.T = 40, .min_g = 0},
        Case{.T = 40, .max_beta = 0}, Case{.T = 40, .max_beta = 2}, Case{.T = 40, .min_g = -50},
        Case{.T = 40, .min_g = -1e4}));

TEST(ReferenceGatedDeltaRuleGradients, EqualFiniteDifferences) {
  for (const Case& c :
       {Case{.T = 19, .H = 1, .HV = 2, .K = 3, .V = 2, .qk_l2norm = true},
        Case{.T = 18, .K = 2, .V = 3, .cu_seqlens = {0, 1, 1, 18}, .state_v_first = true}}) {
    SCOPED_TRACE(c);
    GatedDeltaRuleInputs inputs = random_inputs(c);
    const auto loss = [&] {
      const Results results =
          run(c, inputs, reference::recurrent_gated_delta_rule<double>, nullptr);
      double sum = 0;
      for (size_t i = 0; i < inputs.d_o.size(); ++i) sum += results.at("o")[i] * inputs.d_o[i];
      for (size_t i = 0; i < inputs.d_final_state.size(); ++i) {
        sum += results.at("final_state")[i] * inputs.d_final_state[i];
      }
      return sum;
    };
    const Results by_tokens = recurrent(c, inputs);
    const Results by_chunks = chunked(c, inputs);
    const std::map<std::string, Values*> differentiable = {
        {"d_q", &inputs.q}, {"d_k", &inputs.k},       {"d_v", &inputs.v},
        {"d_g", &inputs.g}, {"d_beta", &inputs.beta}, {"d_initial_state", &inputs.initial_state}};
    for (const auto& [name, input] : differentiable) {
      const Values expected = numerical_gradient(loss, *input);
      // Truncation and rounding of the differences are about 1e-10 times the loss's third
      // derivative and its value, both below 1e2 here.
      expect_close(by_tokens.at(name), expected, {1e-8, 1e-8}, name + " by tokens");
      expect_close(by_chunks.at(name), expected, {1e-8, 1e-8}, name + " by chunks");
    }
  }
}

// -infinity as a log decay forgets everything; neither form may make NaN of it.
TEST(ReferenceGatedDeltaRuleHostile, InfiniteDecay) {
  const Case c{.T = 20};
  GatedDeltaRuleInputs inputs = random_inputs(c);
  for (const size_t t : {0, 3, 4, 17}) inputs.g[t] = -std::numeric_limits<double>::infinity();
  const Results expected = recurrent(c, inputs);
  for (const double value : expected.at("d_g")) ASSERT_TRUE(std::isfinite(value));
  expect_close(chunked(c, inputs), expected, rounding(c));
}

TEST(ReferenceGatedDeltaRuleHostile, ZeroKeysAndQueries) {
  const Case c{.T = 20, .qk_l2norm = true};
  GatedDeltaRuleInputs inputs = random_inputs(c);
  std::fill(inputs.k.begin(), inputs.k.begin() + 10 * c.K, 0.0);
  std::fill(inputs.q.begin() + 5 * c.K, inputs.q.end(), 0.0);
  const Results expected = recurrent(c, inputs);
  for (const double value : expected.at("d_k")) ASSERT_TRUE(std::isfinite(value));
  expect_close(chunked(c, inputs), expected, rounding(c));
}

TEST(ReferenceGatedDeltaRuleHeads, ConsecutiveValueHeadsShareAKeyHead) {
  const Case grouped{.T = 20, .H = 2, .HV = 4};
  Case repeated = grouped;
  repeated.H = 4;
  const GatedDeltaRuleInputs inputs = random_inputs(grouped);
  GatedDeltaRuleInputs wide = inputs;
  for (const auto member : {&GatedDeltaRuleInputs::q, &GatedDeltaRuleInputs::k}) {
    (wide.*member).clear();
    for (int64_t t = 0; t < grouped.T; ++t) {
      for (const int64_t head : {0, 0, 1, 1}) {
        const auto row = (inputs.*member).begin() + (t * grouped.H + head) * grouped.K;
        (wide.*member).insert((wide.*member).end(), row, row + grouped.K);
      }
    }
  }
  EXPECT_EQ(chunked(grouped, inputs).at("o"), chunked(repeated, wide).at("o"));
  EXPECT_EQ(recurrent(grouped, inputs).at("o"), recurrent(repeated, wide).at("o"));
}

TEST(ReferenceGatedDeltaRuleStates, InPlace) {
  for (const bool v_first : {false, true}) {
    const Case c{.B = 2, .T = 20, .HV = 3, .K = 5, .V = 3, .state_v_first = v_first};
    const GatedDeltaRuleInputs inputs = random_inputs(c);
    for (const ForwardKernel forward : {&reference::recurrent_gated_delta_rule<double>,
                                        &reference::chunk_gated_delta_rule<double>}) {
      EXPECT_EQ(GatedDeltaRuleRunner(c, inputs).run_in_place(forward),
                run(c, inputs, forward, nullptr));
    }
  }
}

TEST(ReferenceGatedDeltaRuleStates, SegmentStatesAreTheFinalStatesOfPrefixes) {
  const Case whole{.T = 2 * kernels::kSegmentTokens + 1, .HV = 2, .K = 3, .V = 2};
  GatedDeltaRuleInputs inputs = random_inputs(whole);
  const Values segments = chunked(whole, inputs).at("segment_states");
  ASSERT_EQ(segments.size(), 3U * 2 * 3 * 2);
  Case prefix = whole;
  prefix.T = kernels::kSegmentTokens;
  const Values state =
      run(prefix, inputs, reference::recurrent_gated_delta_rule<double>, nullptr).at("final_state");
  const Values second(segments.begin() + 12, segments.begin() + 24);
  expect_close(second, state, 1e-6, "segment state");  // stored as fp32, of magnitude about 1
}

// In Real = float, and with inputs and outputs in each dtype: the error against fp64 on the same
// rounded inputs is the rounding of the result plus that of fp32 arithmetic.
TEST(ReferenceGatedDeltaRuleDTypes, RoundOnlyResults) {
  using kernels::DType;
  const std::map<DType, double> epsilon = {
      {DType::f32, 0x1p-23}, {DType::bf16, 0x1p-8}, {DType::f16, 0x1p-11}};
  for (const auto& [dtype, unit] : epsilon) {
    const Case narrow{
        .B = 2, .T = 20, .H = 2, .HV = 4, .K = 5, .V = 3, .dtype = dtype, .qk_l2norm = true};
    SCOPED_TRACE(narrow);
    const GatedDeltaRuleInputs inputs = random_inputs(narrow);
    Case wide = narrow;
    wide.dtype = DType::f64;
    const double tolerance = unit + rounding(narrow, 0x1p-24);
    const Results expected = recurrent(wide, inputs);
    expect_close(run(narrow, inputs, reference::recurrent_gated_delta_rule<float>,
                     reference::recurrent_gated_delta_rule_backward<float>),
                 expected, tolerance);
    expect_close(run(narrow, inputs, reference::chunk_gated_delta_rule<float>,
                     reference::chunk_gated_delta_rule_backward<float>),
                 expected, tolerance);
  }
}

}  // namespace
}  // namespace gdn::test
