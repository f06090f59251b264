#include <algorithm>
#include <array>
#include <memory>
#include <vector>

#include <ATen/core/grad_mode.h>
#include <ATen/ops/isfinite.h>
#include <ATen/record_function.h>

#include <gdn/training/non_finite.h>

namespace gdn {
namespace {

int64_t count_non_finite(const at::Tensor& tensor) {
  if (!tensor.defined() || !tensor.is_floating_point() || tensor.numel() == 0) return 0;
  return tensor.numel() - at::isfinite(tensor.detach()).sum().item<int64_t>();
}

/// What the callback of the running first_non_finite_operator() knows; callbacks carry no state.
struct Watch {
  const NamedTensors& parameters;
  std::optional<std::string> found;
};
thread_local Watch* watch = nullptr;

/// Results without meaning: memory not yet written, and infinities put somewhere on purpose.
bool gives_no_result(std::string_view name) {
  constexpr std::array<std::string_view, 4> kParts = {"empty", "full", "fill", "resize"};
  return std::any_of(kParts.begin(), kParts.end(), [&](std::string_view part) {
    return name.find(part) != std::string_view::npos;
  });
}

/// An operator's inputs, which are gone when it ends.
struct Inputs : at::ObserverContext {
  std::vector<at::Tensor> tensors;
};

std::unique_ptr<at::ObserverContext> before_operator(const at::RecordFunction& function) {
  auto inputs = std::make_unique<Inputs>();
  if (watch == nullptr || watch->found) return inputs;
  for (const c10::IValue& input : function.inputs()) {
    if (input.isTensor() && input.toTensor().defined()) inputs->tensors.push_back(input.toTensor());
  }
  return inputs;
}

/// Views show memory that others may still write; in-place operators end with an underscore.
bool is_view(std::string_view name, const at::Tensor& output, const Inputs& inputs) {
  if (name.ends_with('_')) return false;
  return std::any_of(inputs.tensors.begin(), inputs.tensors.end(),
                     [&](const at::Tensor& input) { return input.is_alias_of(output); });
}

std::string describe_operator(std::string_view name, const Inputs& inputs) {
  std::string text = "the result of " + std::string(name);
  for (const at::Tensor& input : inputs.tensors) {
    for (const auto& [parameter_name, parameter] : watch->parameters) {
      if (input.is_alias_of(parameter)) text += " with " + parameter_name;
    }
  }
  return text;
}

void after_operator(const at::RecordFunction& function, at::ObserverContext* context) {
  const std::string_view name = function.name();
  if (watch == nullptr || watch->found || gives_no_result(name)) return;
  const at::DisableRecordFunctionGuard no_recursion;
  const at::NoGradGuard no_grad;
  const auto& inputs = static_cast<const Inputs&>(*context);
  for (const c10::IValue& output : function.outputs()) {
    if (!output.isTensor() || !output.toTensor().defined()) continue;
    if (is_view(name, output.toTensor(), inputs)) continue;
    if (count_non_finite(output.toTensor()) == 0) continue;
    watch->found = describe_operator(name, inputs);
    return;
  }
}

}  // namespace

std::optional<std::string> first_non_finite(const NamedTensors& tensors) {
  const at::NoGradGuard no_grad;
  for (const auto& [name, tensor] : tensors) {
    const int64_t count = count_non_finite(tensor);
    if (count == 0) continue;
    return name + " (" + std::to_string(count) + " of " + std::to_string(tensor.numel()) +
           " values)";
  }
  return std::nullopt;
}

std::optional<std::string> first_non_finite_operator(const std::function<void()>& computation,
                                                     const NamedTensors& parameters) {
  Watch current{parameters, std::nullopt};
  watch = &current;
  const auto handle =
      at::addThreadLocalCallback(at::RecordFunctionCallback(before_operator, after_operator)
                                     .needsInputs(true)
                                     .needsOutputs(true)
                                     .scopes({at::RecordScope::FUNCTION}));
  struct Remove {
    at::CallbackHandle handle;
    ~Remove() {
      at::removeCallback(handle);
      watch = nullptr;
    }
  } const remove{handle};
  const at::RecordFunctionGuard on(true);
  computation();
  return current.found;
}

}  // namespace gdn
