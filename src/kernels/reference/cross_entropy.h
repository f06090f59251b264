// The specification of cross-entropy in plain loops.
#pragma once

#include <gdn/kernels/cross_entropy.h>

namespace gdn::kernels::reference {

/// Computed and accumulated in Real (float or double), whatever the dtypes in memory are.
template <typename Real>
void cross_entropy(const CrossEntropyForward& p);

template <typename Real>
void cross_entropy_backward(const CrossEntropyBackward& p);

}  // namespace gdn::kernels::reference
