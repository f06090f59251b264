// A linear map of few rows on a CPU, for decoding: SIMD through Highway, instruction set chosen at
// run time.
#pragma once

#include <gdn/kernels/small_batch_linear.h>

namespace gdn::kernels::cpu {

/// dtype f32, bf16 or f16, and int8 weights; any sizes, fp32 inside. The weight is read from memory
/// once. A row of y has the same bits for any parallel_for and whatever the other rows are.
void small_batch_linear(const SmallBatchLinear& p);

}  // namespace gdn::kernels::cpu
