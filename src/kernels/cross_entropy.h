// Parameters of the cross-entropy kernels.
//
//   loss_m = log(sum_j exp(x_mj)) - x_m,target_m        d_x_mj = d_loss_m (softmax(x_m)_j - [j =
//   target_m])
//
// Rows whose target is ignore_index have loss 0 and gradient 0, whatever their logits.
#pragma once

#include <cstdint>

#include <gdn/kernels/types.h>

namespace gdn::kernels {

struct CrossEntropyProblem {
  int64_t M = 0;  // rows
  int64_t vocabulary = 0;
  int64_t ignore_index = 0;
  DType dtype = DType::f32;         // of logits and d_logits
  ConstView2 logits;                // [M, vocabulary]
  const int64_t* target = nullptr;  // [M]; in [0, vocabulary), or ignore_index
  ParallelFor parallel_for = serial_for;
};

struct CrossEntropyForward : CrossEntropyProblem {
  void* loss = nullptr;         // [M] fp32 (f64: double)
  void* log_sum_exp = nullptr;  // [M] fp32 (f64: double); ignored rows: 0
};

struct CrossEntropyBackward : CrossEntropyProblem {
  const void* log_sum_exp = nullptr;  // as the forward wrote it
  const void* d_loss = nullptr;       // [M] fp32 (f64: double)
  MutableView2 d_logits;              // [M, vocabulary]; may be the memory of logits
};

}  // namespace gdn::kernels
