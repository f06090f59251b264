// The short convolution on a CPU: SIMD through Highway, instruction set chosen at run time.
#pragma once

#include <gdn/kernels/short_convolution.h>

namespace gdn::kernels::cpu {

/// dtype f32, bf16 or f16, any sizes; fp32 inside. The same bits for any parallel_for.
void short_convolution(const ShortConvolutionForward& p);

/// Every gradient is written, none is read.
void short_convolution_backward(const ShortConvolutionBackward& p);

}  // namespace gdn::kernels::cpu
