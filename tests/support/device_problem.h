// One problem of the gated delta rule on a GPU: its inputs and what a forward writes, for tests of
// forwards and backwards; and how their results are judged.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <support/device_tensor.h>

#include <gtest/gtest.h>

#include <gdn/kernels/gated_delta_rule.h>

namespace gdn::test {

inline Values poison(int64_t count) {
  return Values(static_cast<size_t>(count), std::numeric_limits<double>::quiet_NaN());
}

/// Device memory of a problem; outputs are poisoned. `gap` elements lie between heads.
struct DeviceProblem {
  DeviceTensor q, k, v, o;
  DeviceArray g, beta, initial_state, final_state, segment_states;
  kernels::GatedDeltaRuleForward forward;  // of pointers to device memory
  int64_t longest;                         // tokens of a sequence

  DeviceProblem(const GatedDeltaRuleCase& c, const GatedDeltaRuleInputs& inputs, int64_t gap)
      : q(c, c.H, gap, &inputs.q, c.K),
        k(c, c.H, gap, &inputs.k, c.K),
        v(c, c.HV, gap, &inputs.v, c.V),
        o(c, c.HV, gap, nullptr, c.V),
        g(kernels::DType::f32, inputs.g),
        beta(kernels::DType::f32, inputs.beta),
        initial_state(kernels::DType::f32, inputs.initial_state),
        final_state(kernels::DType::f32, poison(c.sequences() * c.HV * c.K * c.V)),
        segment_states(kernels::DType::f32, poison(segments(c) * c.HV * c.K * c.V)),
        longest(c.cu_seqlens.empty() ? c.T : 0) {
    auto& p = forward;
    static_cast<kernels::GatedDeltaRuleProblem&>(p) = sizes(c);
    p.scale = 0.7;  // as the reference's runner
    p.state_v_first = c.state_v_first;
    for (size_t n = 1; n < c.cu_seqlens.size(); ++n) {
      longest = std::max(longest, c.cu_seqlens[n] - c.cu_seqlens[n - 1]);
    }
    if (!c.cu_seqlens.empty()) {
      const size_t bytes = c.cu_seqlens.size() * sizeof(int64_t);
      check(cudaMalloc(&cu_seqlens_, bytes));
      check(cudaMemcpy(cu_seqlens_, c.cu_seqlens.data(), bytes, cudaMemcpyHostToDevice));
    }
    p.cu_seqlens = cu_seqlens_;
    p.q = q.const_view();
    p.k = k.const_view();
    p.v = v.const_view();
    p.o = o.view();
    p.g = g.data();
    p.beta = beta.data();
    p.initial_state = c.states ? initial_state.data() : nullptr;
    p.final_state = final_state.data();
    p.segment_states = static_cast<float*>(segment_states.data());
  }
  DeviceProblem(const DeviceProblem&) = delete;
  DeviceProblem& operator=(const DeviceProblem&) = delete;
  ~DeviceProblem() { cudaFree(cu_seqlens_); }

 private:
  /// cu_seqlens in host memory.
  static kernels::GatedDeltaRuleProblem sizes(const GatedDeltaRuleCase& c) {
    kernels::GatedDeltaRuleProblem p;
    p.B = c.B;
    p.T = c.T;
    p.H = c.H;
    p.HV = c.HV;
    p.K = c.K;
    p.V = c.V;
    p.N = c.sequences();
    p.chunk_size = 64;
    p.dtype = c.dtype;
    p.cu_seqlens = c.cu_seqlens.empty() ? nullptr : c.cu_seqlens.data();
    return p;
  }
  static int64_t segments(const GatedDeltaRuleCase& c) { return kernels::segment_count(sizes(c)); }

  int64_t* cu_seqlens_ = nullptr;
};

/// Every result that is wanted within `units` units of its dtype, relative to whole tensors.
inline void expect_near(const Results& got, const Results& want, double units,
                        kernels::DType dtype) {
  const double bound = units * std::ldexp(1.0, dtype == kernels::DType::bf16 ? -9 : -12);
  for (const auto& [name, values] : want) {
    ASSERT_EQ(got.at(name).size(), values.size()) << name;
    const double error = relative_error(got.at(name), values);
    EXPECT_LE(error, bound) << name;  // false for NaN
    std::printf("    %-16s relative error %.2e\n", name.c_str(), error);
  }
}

inline void expect_same_bits(const Results& first, const Results& again) {
  for (const auto& [name, values] : first) {
    EXPECT_EQ(std::memcmp(values.data(), again.at(name).data(), values.size() * sizeof(double)), 0)
        << name;
  }
}

}  // namespace gdn::test
