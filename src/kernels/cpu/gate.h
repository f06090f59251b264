// The gate of the gated delta rule on a CPU: SIMD through Highway, instruction set chosen at run
// time.
#pragma once

#include <gdn/kernels/gate.h>

namespace gdn::kernels::cpu {

/// dtype f32, bf16 or f16, any sizes; fp32 inside. The same bits for any parallel_for.
void gate(const GateForward& p);

/// Every gradient is written, none is read.
void gate_backward(const GateBackward& p);

}  // namespace gdn::kernels::cpu
