// Cross-entropy on NVIDIA GPUs; stream.h says what all kernels here have in common.
#pragma once

#include <gdn/kernels/cross_entropy.h>
#include <gdn/kernels/cuda/stream.h>

namespace gdn::kernels::cuda {

/// A row whose target is neither in [0, vocabulary) nor ignore_index gets NaN for its loss, here
/// and its gradient below: the host cannot look at the values without waiting for them.
void cross_entropy(const CrossEntropyForward& p, Stream stream);

/// Every gradient is written, none is read.
void cross_entropy_backward(const CrossEntropyBackward& p, Stream stream);

}  // namespace gdn::kernels::cuda
