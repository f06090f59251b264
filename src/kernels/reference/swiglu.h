// The specification of SwiGLU in plain loops.
#pragma once

#include <gdn/kernels/swiglu.h>

namespace gdn::kernels::reference {

/// Computed and accumulated in Real (float or double), whatever the dtypes in memory are.
template <typename Real>
void swiglu(const SwigluForward& p);

template <typename Real>
void swiglu_backward(const SwigluBackward& p);

}  // namespace gdn::kernels::reference
