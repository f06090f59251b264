// A backward of the gated delta rule on the device against the recurrence in fp64.
//
// Bound on the relative error of whole tensors: the forward's values that it takes up carry up to 8
// units of 2^-9 (bf16) or 2^-12 (fp16), as the forward's test says. On the way back a value passes
// the same number of roundings: dS', dU, dV, dV decayed, dP or dG, and the result. 16 units.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>
#include <support/device_tensor.h>

#include <gtest/gtest.h>

#include <gdn/kernels/gated_delta_rule.h>
#include <gdn/kernels/reference/gated_delta_rule.h>

namespace gdn::test {

/// What is tested: a forward for the segment states, a backward and the scratch memory it needs.
struct DeviceBackward {
  void (*forward)(const kernels::GatedDeltaRuleForward&);
  size_t (*scratch)(const kernels::GatedDeltaRuleBackward&);
  void (*backward)(const kernels::GatedDeltaRuleBackward&, void* scratch);
};

inline Values poison(int64_t count) {
  return Values(static_cast<size_t>(count), std::numeric_limits<double>::quiet_NaN());
}

/// Forward for its segment states, then backward.
inline Results run_device(const DeviceBackward& kernel, const GatedDeltaRuleCase& c,
                          const GatedDeltaRuleInputs& inputs, int64_t gap = 0) {
  DeviceTensor q(c, c.H, gap, &inputs.q, c.K);
  DeviceTensor k(c, c.H, gap, &inputs.k, c.K);
  DeviceTensor v(c, c.HV, gap, &inputs.v, c.V);
  DeviceTensor o(c, c.HV, gap, nullptr, c.V);
  DeviceTensor d_o(c, c.HV, gap, &inputs.d_o, c.V);
  DeviceTensor d_q(c, c.H, gap, nullptr, c.K);
  DeviceTensor d_k(c, c.H, gap, nullptr, c.K);
  DeviceTensor d_v(c, c.HV, gap, nullptr, c.V);
  DeviceArray g(kernels::DType::f32, inputs.g);
  DeviceArray beta(kernels::DType::f32, inputs.beta);
  DeviceArray initial_state(kernels::DType::f32, inputs.initial_state);
  DeviceArray d_final_state(kernels::DType::f32, inputs.d_final_state);
  DeviceArray d_g(kernels::DType::f32, poison(c.B * c.T * c.HV));
  DeviceArray d_beta(kernels::DType::f32, poison(c.B * c.T * c.HV));
  DeviceArray d_initial_state(kernels::DType::f32,
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
  DeviceArray segments(kernels::DType::f32, poison(kernels::segment_count(f) * c.HV * c.K * c.V));
  f.cu_seqlens = cu_seqlens;
  f.o = o.view();
  f.segment_states = static_cast<float*>(segments.data());
  kernel.forward(f);

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
  const size_t bytes = kernel.scratch(b);
  check(cudaMalloc(&scratch, bytes + 16));
  check(cudaMemset(scratch, 0xff, bytes));  // NaN
  kernel.backward(b, scratch);
  check(cudaDeviceSynchronize());
  Results results = {{"d_q", d_q.values()},       {"d_k", d_k.values()},
                     {"d_v", d_v.values()},       {"d_g", d_g.values()},
                     {"d_beta", d_beta.values()}, {"d_initial_state", d_initial_state.values()}};
  cudaFree(scratch);
  cudaFree(cu_seqlens);
  return results;
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
  const Results want = reference(c, inputs);
  const double bound = 16 * std::ldexp(1.0, c.dtype == kernels::DType::bf16 ? -9 : -12);
  for (const auto& [name, values] : want) {
    ASSERT_EQ(got.at(name).size(), values.size()) << name;
    const double error = relative_error(got.at(name), values);
    EXPECT_LE(error, bound) << name;  // false for NaN
    std::printf("    %-16s relative error %.2e\n", name.c_str(), error);
  }
}

/// The same bits on `runs` further runs.
inline void expect_same_bits(const DeviceBackward& kernel, const GatedDeltaRuleCase& c, int runs) {
  const auto inputs = random_inputs(c);
  const Results first = run_device(kernel, c, inputs);
  for (int run = 0; run < runs; ++run) {
    const Results again = run_device(kernel, c, inputs);
    for (const auto& [name, values] : first) {
      EXPECT_EQ(std::memcmp(values.data(), again.at(name).data(), values.size() * sizeof(double)),
                0)
          << name;
    }
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
