// The normalisations on a CPU: SIMD through Highway, instruction set chosen at run time.
#pragma once

#include <gdn/kernels/norm.h>

namespace gdn::kernels::cpu {

/// dtype f32, bf16 or f16, any sizes; fp32 inside. The same bits for any parallel_for.
void norm(const NormForward& p);

/// Every gradient is written, none is read.
void norm_backward(const NormBackward& p);

}  // namespace gdn::kernels::cpu
