// Activation checkpointing: memory for time.
#pragma once

#include <functional>
#include <vector>

#include <ATen/core/Tensor.h>

namespace gdn {

/// function(x), keeping only x: the backward runs `function` again, under the same autocast state.
/// `parameters` are the leaves that `function` uses; it must draw no random numbers.
at::Tensor recompute_in_backward(std::function<at::Tensor(const at::Tensor&)> function,
                                 const at::Tensor& x, const std::vector<at::Tensor>& parameters);

}  // namespace gdn
