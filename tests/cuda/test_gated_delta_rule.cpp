// The Hopper forward of the gated delta rule against the recurrence in fp64. Needs a GPU.
//
// Bound on the relative error of whole tensors: a value passes through at most six roundings to the
// operands' dtype (S, R, T or P, U, decayed U, O), each of relative size 2^-9 (bf16) or 2^-12
// (fp16), and the inverse adds three of fp16: together under 8 units.

#include <cmath>
#include <cstring>
#include <limits>
#include <support/device_tensor.h>
#include <vector>

#include <gtest/gtest.h>

#include <gdn/kernels/cuda/gated_delta_rule.h>
#include <gdn/kernels/reference/gated_delta_rule.h>

namespace gdn::test {
namespace {

using kernels::DType;

Results run_device(const GatedDeltaRuleCase& c, const GatedDeltaRuleInputs& inputs,
                   int64_t gap = 0) {
  kernels::GatedDeltaRuleForward p;
  p.B = c.B;
  p.T = c.T;
  p.H = c.H;
  p.HV = c.HV;
  p.K = c.K;
  p.V = c.V;
  p.N = c.sequences();
  p.chunk_size = 64;
  p.dtype = c.dtype;
  p.scale = 0.7;  // as the reference's runner
  p.state_v_first = c.state_v_first;
  DeviceTensor q(c, c.H, gap, &inputs.q);
  DeviceTensor k(c, c.H, gap, &inputs.k);
  DeviceTensor v(c, c.HV, gap, &inputs.v);
  DeviceTensor o(c, c.HV, gap, nullptr);
  DeviceArray g(DType::f32, inputs.g);
  DeviceArray beta(DType::f32, inputs.beta);
  DeviceArray initial_state(DType::f32, inputs.initial_state);
  const auto poison = [&](int64_t states) {
    return Values(static_cast<size_t>(states * c.HV * c.K * c.V),
                  std::numeric_limits<double>::quiet_NaN());
  };
  p.cu_seqlens = c.cu_seqlens.empty() ? nullptr : c.cu_seqlens.data();
  const int64_t segments = kernels::segment_count(p);
  DeviceArray final_state(DType::f32, poison(p.N));
  DeviceArray segment_states(DType::f32, poison(segments));
  int64_t* cu_seqlens = nullptr;
  if (!c.cu_seqlens.empty()) {
    const size_t bytes = c.cu_seqlens.size() * sizeof(int64_t);
    check(cudaMalloc(&cu_seqlens, bytes));
    check(cudaMemcpy(cu_seqlens, c.cu_seqlens.data(), bytes, cudaMemcpyHostToDevice));
  }
  p.cu_seqlens = cu_seqlens;
  p.q = q.const_view();
  p.k = k.const_view();
  p.v = v.const_view();
  p.o = o.view();
  p.g = g.data();
  p.beta = beta.data();
  p.initial_state = c.states ? initial_state.data() : nullptr;
  p.final_state = final_state.data();
  p.segment_states = static_cast<float*>(segment_states.data());
  kernels::cuda::gated_delta_rule_forward_sm90(p, nullptr);
  check(cudaDeviceSynchronize());
  Results results = {{"o", o.values()},
                     {"final_state", final_state.values()},
                     {"segment_states", segment_states.values()}};
  cudaFree(cu_seqlens);
  return results;
}

Results reference(GatedDeltaRuleCase c, const GatedDeltaRuleInputs& inputs) {
  c.dtype = DType::f64;
  GatedDeltaRuleRunner runner(c, inputs);
  // Segment states are kept for a backward only.
  const auto no_backward = [](const kernels::GatedDeltaRuleBackward&) {};
  Results all = runner.run(kernels::reference::recurrent_gated_delta_rule<double>, no_backward);
  return {{"o", all["o"]},
          {"final_state", all["final_state"]},
          {"segment_states", all["segment_states"]}};
}

void expect_near_reference(const GatedDeltaRuleCase& c, int64_t gap = 0) {
  SCOPED_TRACE(testing::PrintToString(c));
  const GatedDeltaRuleInputs inputs = random_inputs(c);
  const Results got = run_device(c, inputs, gap);
  const Results want = reference(c, inputs);
  const double bound = 8 * std::ldexp(1.0, c.dtype == DType::bf16 ? -9 : -12);
  for (const auto& [name, values] : want) {
    ASSERT_EQ(got.at(name).size(), values.size()) << name;
    const double error = relative_error(got.at(name), values);
    EXPECT_LE(error, bound) << name;  // false for NaN
    std::printf("    %-12s relative error %.2e\n", name.c_str(), error);
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

TEST(GatedDeltaRuleSm90, SameBitsOnEveryRun) {
  const auto c = hopper_case(4, 1000, 8, 40, 9);
  const auto inputs = random_inputs(c);
  const Results first = run_device(c, inputs);
  for (int run = 0; run < 3; ++run) {
    const Results again = run_device(c, inputs);
    for (const auto& [name, values] : first) {
      EXPECT_EQ(std::memcmp(values.data(), again.at(name).data(), values.size() * sizeof(double)),
                0)
          << name;
    }
  }
}

TEST(GatedDeltaRuleSm90, SaysWhatItCannotServe) {
  kernels::GatedDeltaRuleForward p;
  p.K = 64;
  p.V = 128;
  p.dtype = DType::bf16;
  EXPECT_NE(kernels::cuda::why_not_sm90(p), "");
  EXPECT_THROW(kernels::cuda::gated_delta_rule_forward_sm90(p, nullptr), std::invalid_argument);
}

}  // namespace
}  // namespace gdn::test
