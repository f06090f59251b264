// The specification of the normalisations in plain loops.
#pragma once

#include <gdn/kernels/norm.h>

namespace gdn::kernels::reference {

/// Computed and accumulated in Real (float or double), whatever the dtypes in memory are.
template <typename Real>
void norm(const NormForward& p);

template <typename Real>
void norm_backward(const NormBackward& p);

}  // namespace gdn::kernels::reference
