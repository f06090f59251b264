// The specification of the short convolution in plain loops.
#pragma once

#include <gdn/kernels/short_convolution.h>

namespace gdn::kernels::reference {

/// Computed and accumulated in Real (float or double), whatever the dtypes in memory are.
template <typename Real>
void short_convolution(const ShortConvolutionForward& p);

template <typename Real>
void short_convolution_backward(const ShortConvolutionBackward& p);

}  // namespace gdn::kernels::reference
