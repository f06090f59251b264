// Parameters of the gate of the gated delta rule: the log decay of each token and value head.
//
//   g = -exp(A_log) * softplus(a + dt_bias)
//
// Dimensions: M tokens, HV value heads.
#pragma once

#include <cstdint>

#include <gdn/kernels/types.h>

namespace gdn::kernels {

struct GateProblem {
  int64_t M = 0, HV = 0;
  DType dtype = DType::f32;       // of a and d_a
  const void* a = nullptr;        // [M, HV] contiguous
  const void* A_log = nullptr;    // [HV] fp32 (f64: double)
  const void* dt_bias = nullptr;  // [HV] fp32 (f64: double)
  ParallelFor parallel_for = serial_for;
};

struct GateForward : GateProblem {
  void* g = nullptr;  // [M, HV] contiguous fp32 (f64: double)
};

struct GateBackward : GateProblem {
  const void* d_g = nullptr;  // [M, HV] contiguous fp32 (f64: double)
  void* d_a = nullptr;        // [M, HV] contiguous
  void* d_A_log = nullptr;    // [HV] fp32 (f64: double)
  void* d_dt_bias = nullptr;  // [HV] fp32 (f64: double)
};

}  // namespace gdn::kernels
