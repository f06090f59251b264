// Several linear layers of one input.
#pragma once

#include <vector>

#include <ATen/core/Tensor.h>

namespace gdn {

/// x weight^T for each weight [out_features, D] of x [..., D], all of one dtype (under autocast of
/// any). The same as so many linear layers, but small ones share a product, and the gradient of x
/// is summed inside the products instead of beside them.
std::vector<at::Tensor> linears(const at::Tensor& x, at::TensorList weights);

}  // namespace gdn
