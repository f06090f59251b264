// Where a NaN or an infinity came from.
#pragma once

#include <functional>
#include <optional>
#include <string>

#include <gdn/training/optimizer.h>

namespace gdn {

/// "parameter NAME (3 of 65536 values)" of the first tensor that holds a value that is not finite.
std::optional<std::string> first_non_finite(const NamedTensors& tensors);

/// Runs `computation` and watches every operator: "the result of aten::mm with model.norm.weight",
/// the first that gave a value that is not finite; `parameters` lends the names.
std::optional<std::string> first_non_finite_operator(const std::function<void()>& computation,
                                                     const NamedTensors& parameters);

}  // namespace gdn
