// SwiGLU on NVIDIA GPUs; stream.h says what all kernels here have in common.
#pragma once

#include <gdn/kernels/cuda/stream.h>
#include <gdn/kernels/swiglu.h>

namespace gdn::kernels::cuda {

void swiglu(const SwigluForward& p, Stream stream);

/// Every gradient is written, none is read.
void swiglu_backward(const SwigluBackward& p, Stream stream);

}  // namespace gdn::kernels::cuda
