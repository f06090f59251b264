// The specification of the gate of the gated delta rule in plain loops.
#pragma once

#include <gdn/kernels/gate.h>

namespace gdn::kernels::reference {

/// Computed and accumulated in Real (float or double), whatever the dtypes in memory are.
template <typename Real>
void gate(const GateForward& p);

template <typename Real>
void gate_backward(const GateBackward& p);

}  // namespace gdn::kernels::reference
