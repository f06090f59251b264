// Runs forwards of the gated delta rule on a GPU, and the recurrence in fp64 beside them.
#pragma once

#include <functional>
#include <support/device_problem.h>

#include <gdn/kernels/reference/gated_delta_rule.h>

namespace gdn::test {

using DeviceForward = std::function<void(const kernels::GatedDeltaRuleForward&)>;

/// Poisoned outputs are filled by `forward`, which gets pointers to device memory.
inline Results run_on_device(const GatedDeltaRuleCase& c, const GatedDeltaRuleInputs& inputs,
                             const DeviceForward& forward, int64_t gap = 0) {
  DeviceProblem problem(c, inputs, gap);
  forward(problem.forward);
  check(cudaDeviceSynchronize());
  return {{"o", problem.o.values()},
          {"final_state", problem.final_state.values()},
          {"segment_states", problem.segment_states.values()}};
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
  expect_near(got, forward_reference(c, inputs), units, c.dtype);
}

}  // namespace gdn::test
