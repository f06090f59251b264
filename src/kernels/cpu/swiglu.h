// SwiGLU on a CPU: SIMD through Highway, instruction set chosen at run time.
#pragma once

#include <gdn/kernels/swiglu.h>

namespace gdn::kernels::cpu {

/// dtype f32, bf16 or f16, any sizes; fp32 inside. The same bits for any parallel_for.
void swiglu(const SwigluForward& p);

/// Every gradient is written, none is read.
void swiglu_backward(const SwigluBackward& p);

}  // namespace gdn::kernels::cpu
