// The Hopper backward of the gated delta rule against the recurrence in fp64. Needs a GPU.
//
// Bound on the relative error of whole tensors: the forward's values that it takes up carry up to 8
// units of 2^-9 (bf16) or 2^-12 (fp16), as the forward's test says. On the way back a value passes
// the same number of roundings: dS', dU, dV, dV decayed, dP or dG, and the result. 16 units.

#include <cmath>
#include <cstring>
#include <limits>
#include <support/device_tensor.h>
#include <vector>

#include <gtest/gtest.h>

#include <gdn/kernels/cuda/gated_delta_rule.h>
#include <gdn/kernels/cuda/sm90/gated_delta_rule/forward_plan.h>
#include <gdn/kernels/reference/gated_delta_rule.h>

namespace gdn::test {
namespace {

using kernels::DType;

Values poison(int64_t count) {
  return Values(static_cast<size_t>(count), std::numeric_limits<double>::quiet_NaN());
}

/// Forward for its segment states, then backward.
Results run_device(const GatedDeltaRuleCase& c, const GatedDeltaRuleInputs& inputs,
                   int64_t gap = 0) {
  DeviceTensor q(c, c.H, gap, &inputs.q);
  DeviceTensor k(c, c.H, gap, &inputs.k);
  DeviceTensor v(c, c.HV, gap, &inputs.v);
  DeviceTensor o(c, c.HV, gap, nullptr);
  DeviceTensor d_o(c, c.HV, gap, &inputs.d_o);
  DeviceTensor d_q(c, c.H, gap, nullptr);
  DeviceTensor d_k(c, c.H, gap, nullptr);
  DeviceTensor d_v(c, c.HV, gap, nullptr);
  DeviceArray g(DType::f32, inputs.g);
  DeviceArray beta(DType::f32, inputs.beta);
  DeviceArray initial_state(DType::f32, inputs.initial_state);
  DeviceArray d_final_state(DType::f32, inputs.d_final_state);
  DeviceArray d_g(DType::f32, poison(c.B * c.T * c.HV));
  DeviceArray d_beta(DType::f32, poison(c.B * c.T * c.HV));
  DeviceArray d_initial_state(DType::f32,
                              poison(static_cast<int64_t>(inputs.initial_state.size())));
  int64_t* cu_seqlens = nullptr;
  if (!c.cu_seqlens.empty()) {
    const size_t bytes = c.cu_seqlens.size() * sizeof(int64_t);
    check(cudaMalloc(&cu_seqlens, bytes));
    check(cudaMemcpy(cu_seqlens, c.cu_seqlens.data(), bytes, cudaMemcpyHostToDevice));
  }
  const auto describe = [&](kernels::GatedDeltaRuleProblem& p) {
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
    p.cu_seqlens = cu_seqlens;
    p.q = q.const_view();
    p.k = k.const_view();
    p.v = v.const_view();
    p.g = g.data();
    p.beta = beta.data();
    p.initial_state = c.states ? initial_state.data() : nullptr;
  };
  kernels::GatedDeltaRuleForward f;
  describe(f);
  f.cu_seqlens = c.cu_seqlens.empty() ? nullptr : c.cu_seqlens.data();
  DeviceArray segments(DType::f32, poison(kernels::segment_count(f) * c.HV * c.K * c.V));
  f.cu_seqlens = cu_seqlens;
  f.o = o.view();
  f.segment_states = static_cast<float*>(segments.data());
  kernels::cuda::sm90::run_forward(f, {}, nullptr, nullptr);

  kernels::GatedDeltaRuleBackward b;
  describe(b);
  b.segment_states = f.segment_states;
  b.d_o = d_o.const_view();
  b.d_q = d_q.view();
  b.d_k = d_k.view();
  b.d_v = d_v.view();
  b.d_g = d_g.data();
  b.d_beta = d_beta.data();
  if (c.states) {
    b.d_final_state = d_final_state.data();
    b.d_initial_state = d_initial_state.data();
  }
  void* scratch = nullptr;
  const size_t bytes = kernels::cuda::gated_delta_rule_backward_sm90_scratch(b);
  check(cudaMalloc(&scratch, bytes + 16));
  check(cudaMemset(scratch, 0xff, bytes));  // NaN
  kernels::cuda::gated_delta_rule_backward_sm90(b, scratch, nullptr);
  check(cudaDeviceSynchronize());
  Results results = {{"d_q", d_q.values()},       {"d_k", d_k.values()},
                     {"d_v", d_v.values()},       {"d_g", d_g.values()},
                     {"d_beta", d_beta.values()}, {"d_initial_state", d_initial_state.values()}};
  cudaFree(scratch);
  cudaFree(cu_seqlens);
  return results;
}

Results reference(GatedDeltaRuleCase c, const GatedDeltaRuleInputs& inputs) {
  c.dtype = DType::f64;
  Results all = run(c, inputs, kernels::reference::recurrent_gated_delta_rule<double>,
                    kernels::reference::recurrent_gated_delta_rule_backward<double>);
  for (const char* name : {"o", "final_state", "segment_states"}) all.erase(name);
  return all;
}

void expect_near_reference(const GatedDeltaRuleCase& c, int64_t gap = 0) {
  SCOPED_TRACE(testing::PrintToString(c));
  const GatedDeltaRuleInputs inputs = random_inputs(c);
  const Results got = run_device(c, inputs, gap);
  const Results want = reference(c, inputs);
  const double bound = 16 * std::ldexp(1.0, c.dtype == DType::bf16 ? -9 : -12);
  for (const auto& [name, values] : want) {
    ASSERT_EQ(got.at(name).size(), values.size()) << name;
    const double error = relative_error(got.at(name), values);
    EXPECT_LE(error, bound) << name;  // false for NaN
    std::printf("    %-16s relative error %.2e\n", name.c_str(), error);
  }
}

TEST(GatedDeltaRuleBackwardSm90, OneChunk) { expect_near_reference(hopper_case(1, 64, 1, 1, 1)); }

TEST(GatedDeltaRuleBackwardSm90, LengthsAroundAChunk) {
  for (const int64_t T : {1, 2, 63, 65, 128, 200}) {
    expect_near_reference(hopper_case(2, T, 1, 2, 10 + static_cast<uint64_t>(T)));
  }
}

TEST(GatedDeltaRuleBackwardSm90, GroupedHeadsStridesAndStates) {
  for (const bool v_first : {false, true}) {
    auto c = hopper_case(2, 333, 2, 6, 3);
    c.state_v_first = v_first;
    expect_near_reference(c, 8);
    c.states = false;
    c.dtype = DType::f16;
    expect_near_reference(c);
  }
}

/// More sequences and heads than half the multiprocessors: both halves of V in one block.
TEST(GatedDeltaRuleBackwardSm90, ManyHeads) { expect_near_reference(hopper_case(3, 70, 8, 32, 2)); }

TEST(GatedDeltaRuleBackwardSm90, PackedSequences) {
  auto c = hopper_case(1, 700, 2, 4, 4);
  c.cu_seqlens = {0, 1, 1, 65, 129, 300, 300, 700};
  expect_near_reference(c);
  c = hopper_case(1, 200, 1, 2, 5);
  for (int64_t n = 0; n <= 40; ++n) c.cu_seqlens.push_back(5 * n);
  expect_near_reference(c);
}

TEST(GatedDeltaRuleBackwardSm90, StrongAndAbsentDecay) {
  for (const double min_g : {0.0, -3.0, -100.0, -1e6}) {
    auto c = hopper_case(1, 256, 1, 2, 5);
    c.min_g = min_g;
    if (min_g == 0.0) c.max_beta = 0.5;
    expect_near_reference(c);
  }
}

TEST(GatedDeltaRuleBackwardSm90, WriteStrengthUpToTwo) {
  auto c = hopper_case(1, 320, 1, 2, 6);
  c.max_beta = 2;
  c.dtype = DType::f16;
  expect_near_reference(c);
  c.dtype = DType::bf16;
  expect_near_reference(c);
}

TEST(GatedDeltaRuleBackwardSm90, WriteStrengthZero) {
  auto c = hopper_case(1, 192, 1, 2, 6);
  c.max_beta = 0;  // dbeta is not zero
  expect_near_reference(c);
}

/// Few heads: the scan cuts these sequences into spans.
TEST(GatedDeltaRuleBackwardSm90, LongSequences) {
  expect_near_reference(hopper_case(1, 2500, 1, 2, 7));
  auto c = hopper_case(1, 5000, 1, 1, 8);
  c.cu_seqlens = {0, 0, 1990, 5000};
  c.min_g = -0.05;
  c.state_v_first = true;
  expect_near_reference(c);
  c.min_g = -0.001;  // as long a memory as a span
  expect_near_reference(c);
}

TEST(GatedDeltaRuleBackwardSm90, NothingLeaksBetweenSequences) {
  auto c = hopper_case(1, 200, 1, 1, 8);
  c.cu_seqlens = {0, 70, 200};
  auto inputs = random_inputs(c);
  const Results clean = run_device(c, inputs);
  for (Values* values : {&inputs.q, &inputs.k, &inputs.v, &inputs.d_o}) {
    std::fill(values->begin() + 70 * 128, values->end(), std::numeric_limits<double>::quiet_NaN());
  }
  const Results poisoned = run_device(c, inputs);
  for (const auto& [name, values] : clean) {
    const size_t row = name == "d_g" || name == "d_beta" ? 1 : 128;
    const size_t count = name == "d_initial_state" ? 128 * 128 : 70 * row;
    for (size_t i = 0; i < count; ++i) {
      ASSERT_EQ(values[i], poisoned.at(name)[i]) << name << " at " << i;
    }
  }
}

TEST(GatedDeltaRuleBackwardSm90, SameBitsOnEveryRun) {
  const auto c = hopper_case(4, 1100, 8, 40, 9);
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

TEST(GatedDeltaRuleBackwardSm90, SaysWhatItCannotServe) {
  kernels::GatedDeltaRuleBackward p;
  p.K = p.V = 128;
  p.dtype = DType::bf16;
  EXPECT_NE(kernels::cuda::why_not_sm90(p), "");  // without segment_states
  EXPECT_THROW(kernels::cuda::gated_delta_rule_backward_sm90(p, nullptr, nullptr),
               std::invalid_argument);
}

}  // namespace
}  // namespace gdn::test
