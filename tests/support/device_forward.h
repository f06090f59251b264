// Runs forwards of the gated delta rule on a GPU, and the recurrence in fp64 beside them.
#pragma once

#include <cstring>
#include <functional>
#include <support/device_tensor.h>

#include <gdn/kernels/reference/gated_delta_rule.h>

namespace gdn::test {

using DeviceForward = std::function<void(const kernels::GatedDeltaRuleForward&)>;

/// Poisoned outputs are filled by `forward`, which gets pointers to device memory.
inline Results run_on_device(const GatedDeltaRuleCase& c, const GatedDeltaRuleInputs& inputs,
                             const DeviceForward& forward, int64_t gap = 0) {
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
  DeviceTensor q(c, c.H, gap, &inputs.q, c.K);
  DeviceTensor k(c, c.H, gap, &inputs.k, c.K);
  DeviceTensor v(c, c.HV, gap, &inputs.v, c.V);
  DeviceTensor o(c, c.HV, gap, nullptr, c.V);
  DeviceArray g(kernels::DType::f32, inputs.g);
  DeviceArray beta(kernels::DType::f32, inputs.beta);
  DeviceArray initial_state(kernels::DType::f32, inputs.initial_state);
  const auto poison = [&](int64_t states) {
    return Values(static_cast<size_t>(states * c.HV * c.K * c.V),
                  std::numeric_limits<double>::quiet_NaN());
  };
  p.cu_seqlens = c.cu_seqlens.empty() ? nullptr : c.cu_seqlens.data();
  DeviceArray final_state(kernels::DType::f32, poison(p.N));
  DeviceArray segment_states(kernels::DType::f32, poison(kernels::segment_count(p)));
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
  forward(p);
  check(cudaDeviceSynchronize());
  Results results = {{"o", o.values()},
                     {"final_state", final_state.values()},
                     {"segment_states", segment_states.values()}};
  cudaFree(cu_seqlens);
  return results;
}

inline Results forward_reference(GatedDeltaRuleCase c, const GatedDeltaRuleInputs& inputs) {
  c.dtype = kernels::DType::f64;
  GatedDeltaRuleRunner runner(c, inputs);
  // Segment states are kept for a backward only.
  const auto no_backward = [](const kernels::GatedDeltaRuleBackward&) {};
  Results all = runner.run(kernels::reference::recurrent_gated_delta_rule<double>, no_backward);
  return {{"o", all["o"]},
          {"final_state", all["final_state"]},
          {"segment_states", all["segment_states"]}};
}

/// Every result of `forward` within `units` units of the operands' dtype of the recurrence,
/// relative to whole tensors.
inline void expect_near_recurrence(const GatedDeltaRuleCase& c, const DeviceForward& forward,
                                   double units, int64_t gap = 0) {
  SCOPED_TRACE(testing::PrintToString(c));
  const GatedDeltaRuleInputs inputs = random_inputs(c);
  const Results got = run_on_device(c, inputs, forward, gap);
  const Results want = forward_reference(c, inputs);
  const double bound = units * std::ldexp(1.0, c.dtype == kernels::DType::bf16 ? -9 : -12);
  for (const auto& [name, values] : want) {
    ASSERT_EQ(got.at(name).size(), values.size()) << name;
    const double error = relative_error(got.at(name), values);
    EXPECT_LE(error, bound) << name;  // false for NaN
    std::printf("    %-14s relative error %.2e\n", name.c_str(), error);
  }
}

inline void expect_same_bits(const Results& first, const Results& again) {
  for (const auto& [name, values] : first) {
    EXPECT_EQ(std::memcmp(values.data(), again.at(name).data(), values.size() * sizeof(double)), 0)
        << name;
  }
}

}  // namespace gdn::test
