// The short convolution on NVIDIA GPUs; stream.h says what all kernels here have in common.
#pragma once

#include <gdn/kernels/cuda/stream.h>
#include <gdn/kernels/short_convolution.h>

namespace gdn::kernels::cuda {

/// One launch where each sequence is a batch row of at most 64 tokens, as in decoding; else the
/// final state takes another one.
void short_convolution(const ShortConvolutionForward& p, Stream stream);

/// Every gradient is written, none is read.
void short_convolution_backward(const ShortConvolutionBackward& p, void* scratch, Stream stream);
int64_t short_convolution_backward_scratch(const ShortConvolutionBackward& p);

}  // namespace gdn::kernels::cuda
