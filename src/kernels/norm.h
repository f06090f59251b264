// Parameters of the normalisations over the last dimension: RMSNorm, gated RMSNorm, L2 norm.
//
//   y_i = x_i * r * weight_i * silu(gate_i)     r = rsqrt(mean(x^2) + eps), or of the sum
//
// Dimensions: M rows of D elements. Backward, with h_i = d_y_i * weight_i * silu(gate_i):
//
//   d_x_i = r * (h_i - x_i r * c)     c = mean(h * x r), or the sum
#pragma once

#include <cstdint>

#include <gdn/kernels/types.h>

namespace gdn::kernels {

/// What the sum of squares is divided by.
enum class NormKind { rms, l2 };

struct NormProblem {
  int64_t M = 0, D = 0;
  NormKind kind = NormKind::rms;
  double eps = 0;
  DType dtype = DType::f32;  // of x, gate, y and their gradients
  DType weight_dtype = DType::f32;
  ConstView2 x;                  // [M, D]
  const void* weight = nullptr;  // [D], or null: ones
  ConstView2 gate;               // [M, D]; data null: no gate
  ParallelFor parallel_for = serial_for;
};

/// With a residual (never together with a gate), what is normed is x + residual, rounded to dtype.
struct NormForward : NormProblem {
  ConstView2 residual;  // [M, D]; data null: none
  MutableView2 sum;     // [M, D]: x + residual; data null exactly when residual's is
  MutableView2 y;       // [M, D]
};

struct NormBackward : NormProblem {
  ConstView2 d_y;            // [M, D]
  ConstView2 d_sum;          // [M, D], never with a gate: added to d_x; data null: none
  MutableView2 d_x;          // [M, D]
  MutableView2 d_gate;       // [M, D]; data null exactly when gate's is
  void* d_weight = nullptr;  // [D] fp32 (f64: double), or null: not wanted
};

}  // namespace gdn::kernels
