// Activation checkpointing: memory for time.
#pragma once

#include <functional>
#include <vector>

#include <ATen/core/Tensor.h>

namespace gdn {

using RecomputedFunction =
    std::function<std::vector<at::Tensor>(const std::vector<at::Tensor>& inputs)>;

/// function(inputs), keeping only the inputs (one or more): the backward runs `function` again,
/// under the same autocast state. `parameters` are the leaves that `function` uses; it must draw no
/// random numbers.
std::vector<at::Tensor> recompute_in_backward(RecomputedFunction function,
                                              const std::vector<at::Tensor>& inputs,
                                              const std::vector<at::Tensor>& parameters);

}  // namespace gdn
