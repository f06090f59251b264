// The gate of the gated delta rule on NVIDIA GPUs; stream.h says what all kernels here have in
// common.
#pragma once

#include <gdn/kernels/cuda/stream.h>
#include <gdn/kernels/gate.h>

namespace gdn::kernels::cuda {

void gate(const GateForward& p, Stream stream);

/// Every gradient is written, none is read.
void gate_backward(const GateBackward& p, void* scratch, Stream stream);
int64_t gate_backward_scratch(const GateBackward& p);

}  // namespace gdn::kernels::cuda
