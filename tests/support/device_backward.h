// A backward of the gated delta rule on the device against the recurrence in fp64.
//
// Bound on the relative error of whole tensors: the forward's values that it takes up carry up to 8
// units of 2^-9 (bf16) or 2^-12 (fp16), as the forward's test says. On the way back a value passes
// the same number of roundings: dS', dU, dV, dV decayed, dP or dG, and the result. 16 units.
#pragma once

#include <limits>
#include <support/device_problem.h>

#include <gtest/gtest.h>

#include <gdn/kernels/cuda/gated_delta_rule.h>
#include <gdn/kernels/reference/gated_delta_rule.h>

namespace gdn::test {

/// What is tested: a forward for the segment states, a backward and the scratch memory it needs.
struct DeviceBackward {
  void (*forward)(const kernels::GatedDeltaRuleForward&);
  size_t (*scratch)(const kernels::GatedDeltaRuleBackward&, int64_t longest, size_t goal);
  void (*backward)(const kernels::GatedDeltaRuleBackward&, int64_t longest, void* scratch,
                   kernels::cuda::Stream, size_t goal);
  size_t scratch_goal = size_t{1} << 30;

  /// In as many waves as there can be.
  DeviceBackward in_waves() const { return {forward, scratch, backward, 1}; }
};

/// Forward for its segment states, then backward.
inline Results run_device(const DeviceBackward& kernel, const GatedDeltaRuleCase& c,
                          const GatedDeltaRuleInputs& inputs, int64_t gap = 0) {
  DeviceProblem problem(c, inputs, gap);
  kernel.forward(problem.forward);
  DeviceTensor d_o(c, c.HV, gap, &inputs.d_o, c.V);
  DeviceTensor d_q(c, c.H, gap, nullptr, c.K);
  DeviceTensor d_k(c, c.H, gap, nullptr, c.K);
  DeviceTensor d_v(c, c.HV, gap, nullptr, c.V);
  DeviceArray d_final_state(kernels::DType::f32, inputs.d_final_state);
  DeviceArray d_g(kernels::DType::f32, poison(c.B * c.T * c.HV));
  DeviceArray d_beta(kernels::DType::f32, poison(c.B * c.T * c.HV));
  DeviceArray d_initial_state(kernels::DType::f32,
                              poison(static_cast<int64_t>(inputs.initial_state.size())));
  kernels::GatedDeltaRuleBackward b;
  static_cast<kernels::GatedDeltaRuleProblem&>(b) = problem.forward;
  b.segment_states = problem.forward.segment_states;
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
  const size_t bytes = kernel.scratch(b, problem.longest, kernel.scratch_goal);
  check(cudaMalloc(&scratch, bytes + 16));
  check(cudaMemset(scratch, 0xff, bytes));  // NaN
  kernel.backward(b, problem.longest, scratch, nullptr, kernel.scratch_goal);
  check(cudaDeviceSynchronize());
  cudaFree(scratch);
  return {{"d_q", d_q.values()},       {"d_k", d_k.values()},
          {"d_v", d_v.values()},       {"d_g", d_g.values()},
          {"d_beta", d_beta.values()}, {"d_initial_state", d_initial_state.values()}};
}

inline Results reference(GatedDeltaRuleCase c, const GatedDeltaRuleInputs& inputs) {
  c.dtype = kernels::DType::f64;
  Results all = run(c, inputs, kernels::reference::recurrent_gated_delta_rule<double>,
                    kernels::reference::recurrent_gated_delta_rule_backward<double>);
  for (const char* name : {"o", "final_state", "segment_states"}) all.erase(name);
  return all;
}

inline void expect_near_reference(const DeviceBackward& kernel, const GatedDeltaRuleCase& c,
                                  int64_t gap = 0) {
  SCOPED_TRACE(testing::PrintToString(c));
  const GatedDeltaRuleInputs inputs = random_inputs(c);
  const Results got = run_device(kernel, c, inputs, gap);
  expect_near(got, reference(c, inputs), 16, c.dtype);
}

/// The same bits on `runs` further runs.
inline void expect_same_bits(const DeviceBackward& kernel, const GatedDeltaRuleCase& c, int runs) {
  const auto inputs = random_inputs(c);
  const Results first = run_device(kernel, c, inputs);
  for (int run = 0; run < runs; ++run) {
    expect_same_bits(first, run_device(kernel, c, inputs));
  }
}

/// What holds for the first sequence, of `tokens` tokens, whatever the second one's inputs are.
inline void expect_nothing_leaks(const DeviceBackward& kernel, GatedDeltaRuleCase c,
                                 int64_t tokens) {
  c.cu_seqlens = {0, tokens, c.T};
  auto inputs = random_inputs(c);
  const Results clean = run_device(kernel, c, inputs);
  const auto poison_from = [&](Values& values, int64_t row) {
    std::fill(values.begin() + tokens * row, values.end(),
              std::numeric_limits<double>::quiet_NaN());
  };
  poison_from(inputs.q, c.H * c.K);
  poison_from(inputs.k, c.H * c.K);
  poison_from(inputs.v, c.HV * c.V);
  poison_from(inputs.d_o, c.HV * c.V);
  const Results poisoned = run_device(kernel, c, inputs);
  for (const auto& [name, values] : clean) {
    // Its share of the result comes first.
    const size_t count = name == "d_initial_state" ? values.size() / 2
                                                   : values.size() / static_cast<size_t>(c.T) *
                                                         static_cast<size_t>(tokens);
    for (size_t i = 0; i < count; ++i) {
      ASSERT_EQ(values[i], poisoned.at(name)[i]) << name << " at " << i;
    }
  }
}

}  // namespace gdn::test
