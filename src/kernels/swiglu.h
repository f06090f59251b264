// Parameters of SwiGLU, the gated activation: y = silu(gate) * up, elementwise over M rows of D.
#pragma once

#include <cstdint>

#include <gdn/kernels/types.h>

namespace gdn::kernels {

struct SwigluProblem {
  int64_t M = 0, D = 0;
  DType dtype = DType::f32;
  ConstView2 gate;  // [M, D]
  ConstView2 up;    // [M, D]
  ParallelFor parallel_for = serial_for;
};

struct SwigluForward : SwigluProblem {
  MutableView2 y;  // [M, D]
};

struct SwigluBackward : SwigluProblem {
  ConstView2 d_y;       // [M, D]
  MutableView2 d_gate;  // [M, D]
  MutableView2 d_up;    // [M, D]
};

}  // namespace gdn::kernels
