// Parameters of a linear map of a few rows, with what stands before and after it in a decoding
// step.
//
//   z_i = x_i, or with a norm x_i r norm_weight_{i mod G} silu(gate_i)
//   y_n = sum_i weight_{n i} z_i
//
// where r = rsqrt(mean(x^2) + eps) of i's group of G. Then one of
//
//   y_n + residual_n
//   silu(y_n) y_{N + n}                    SwiGLU: the weight has 2 N rows
//   silu(bias_n + sum_w taps_{n w} c_w)    the short convolution, for n < channels: c are its
//                                          state's W - 1 inputs and y_n, which joins the state
//
// A weight of int8 stands for weight_{n i} scales_{n, i / Q}.
//
// Dimensions: M rows, D inputs, N outputs, G inputs of a norm's group (it divides D), W taps, Q
// inputs of a scale.
#pragma once

#include <cstdint>

#include <gdn/kernels/types.h>

namespace gdn::kernels {

struct SmallBatchLinear {
  int64_t M = 0, N = 0, D = 0;
  DType dtype = DType::bf16;     // of everything; of all but the weight and scales where it is int8
  ConstView2 x;                  // [M, D]
  const void* weight = nullptr;  // [N, D], or [2 N, D] with swiglu; contiguous

  /// [rows of the weight, ceil(D / Q)] contiguous: the weight is int8. Null: it is of dtype.
  const float* scales = nullptr;
  int64_t scale_size = 0;  // Q

  const void* norm_weight = nullptr;  // [G], or null: no norm
  int64_t norm_size = 0;              // G
  double eps = 0;
  ConstView2 gate;  // [M, D]; data null: none

  ConstView2 residual;  // [M, N]; data null: none
  bool swiglu = false;
  int64_t channels = 0, taps = 0;     // channels 0: no convolution
  const void* conv_weight = nullptr;  // [channels, W] contiguous
  const void* conv_bias = nullptr;    // [channels], or null
  void* conv_state = nullptr;         // [M, channels, W - 1] contiguous, oldest first; updated

  MutableView2 y;  // [M, N]
  /// The work queued just before has not written weight and norm_weight: they may be read while it
  /// still runs.
  bool overlap = false;
  ParallelFor parallel_for = serial_for;  // on a CPU
};

}  // namespace gdn::kernels
