// The gated activation of the MLP.
#pragma once

#include <tuple>

#include <ATen/core/Tensor.h>

namespace gdn {

/// silu(gate) * up, elementwise; gate and up of one shape and dtype.
at::Tensor swiglu(const at::Tensor& gate, const at::Tensor& up);

/// Their gradients, from that of the result.
std::tuple<at::Tensor, at::Tensor> swiglu_backward(const at::Tensor& d_y, const at::Tensor& gate,
                                                   const at::Tensor& up);

/// swiglu(gate, up) weight^T, weight [out_features, D]. The backward computes the activation again
/// instead of keeping it.
at::Tensor swiglu_linear(const at::Tensor& gate, const at::Tensor& up, const at::Tensor& weight);

}  // namespace gdn
