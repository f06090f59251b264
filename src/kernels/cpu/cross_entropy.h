// Cross-entropy on a CPU: SIMD through Highway, instruction set chosen at run time.
#pragma once

#include <gdn/kernels/cross_entropy.h>

namespace gdn::kernels::cpu {

/// dtype f32, bf16 or f16, any sizes; fp32 inside. The same bits for any parallel_for.
void cross_entropy(const CrossEntropyForward& p);

/// Every gradient is written, none is read.
void cross_entropy_backward(const CrossEntropyBackward& p);

}  // namespace gdn::kernels::cpu
