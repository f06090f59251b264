// The normalisations on NVIDIA GPUs; stream.h says what all kernels here have in common.
#pragma once

#include <gdn/kernels/cuda/stream.h>
#include <gdn/kernels/norm.h>

namespace gdn::kernels::cuda {

void norm(const NormForward& p, Stream stream);

/// Every gradient is written, none is read; d_x may be the memory of d_y.
void norm_backward(const NormBackward& p, void* scratch, Stream stream);
int64_t norm_backward_scratch(const NormBackward& p);

}  // namespace gdn::kernels::cuda
