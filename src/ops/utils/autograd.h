// What the operators' autograd kernels share.
#pragma once

#include <optional>

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>

namespace gdn {

/// Whether a call with these inputs (tensors or optional tensors) is recorded.
template <typename... Tensors>
bool needs_gradient(const Tensors&... inputs) {
  const auto requires_grad = [](const std::optional<at::Tensor>& input) {
    return input && input->defined() && input->requires_grad();
  };
  return at::GradMode::is_enabled() && (requires_grad(inputs) || ...);
}

/// An optional argument as a saved tensor (undefined when absent), and back.
inline at::Tensor saved(const std::optional<at::Tensor>& tensor) {
  return tensor.value_or(at::Tensor());
}
inline std::optional<at::Tensor> restored(const at::Tensor& tensor) {
  return tensor.defined() ? std::optional<at::Tensor>(tensor) : std::nullopt;
}

}  // namespace gdn
