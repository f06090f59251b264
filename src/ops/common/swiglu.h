// The gated activation of the MLP.
#pragma once

#include <ATen/core/Tensor.h>

namespace gdn {

/// silu(gate) * up, elementwise; gate and up of one shape and dtype.
at::Tensor swiglu(const at::Tensor& gate, const at::Tensor& up);

}  // namespace gdn
