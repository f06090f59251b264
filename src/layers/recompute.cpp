#include <utility>

#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <c10/util/ScopeExit.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>

#include <gdn/layers/recompute.h>

namespace gdn {
namespace {

/// Autocast's settings for one device, put in place for a scope. Its cache of cast weights is off:
/// casts made without gradients must not serve the computation that has them, nor the reverse.
class AutocastScope {
 public:
  AutocastScope(c10::DeviceType device, bool enabled, at::ScalarType dtype)
      : device_(device),
        enabled_(at::autocast::is_autocast_enabled(device)),
        cached_(at::autocast::is_autocast_cache_enabled()),
        dtype_(at::autocast::get_autocast_dtype(device)) {
    at::autocast::set_autocast_enabled(device, enabled);
    at::autocast::set_autocast_dtype(device, dtype);
    at::autocast::set_autocast_cache_enabled(false);
  }
  ~AutocastScope() {
    at::autocast::set_autocast_enabled(device_, enabled_);
    at::autocast::set_autocast_dtype(device_, dtype_);
    at::autocast::set_autocast_cache_enabled(cached_);
  }
  AutocastScope(const AutocastScope&) = delete;
  AutocastScope& operator=(const AutocastScope&) = delete;

 private:
  c10::DeviceType device_;
  bool enabled_, cached_;
  at::ScalarType dtype_;
};

/// Set while a backward runs a function again: what that would recompute in its turn, it keeps.
thread_local bool recomputing = false;

struct Recomputation : torch::CustomClassHolder {
  Recomputation(RecomputedFunction function, size_t inputs, c10::DeviceType device)
      : function(std::move(function)),
        inputs(inputs),
        device(device),
        autocast(at::autocast::is_autocast_enabled(device)),
        dtype(at::autocast::get_autocast_dtype(device)) {}

  std::vector<at::Tensor> run(const std::vector<at::Tensor>& tensors) const {
    const AutocastScope scope(device, autocast, dtype);
    return function(tensors);
  }

  RecomputedFunction function;
  size_t inputs;
  c10::DeviceType device;
  bool autocast;
  at::ScalarType dtype;
};

class Recompute : public torch::autograd::Function<Recompute> {
 public:
  static torch::autograd::variable_list forward(
      torch::autograd::AutogradContext* context,
      const c10::intrusive_ptr<Recomputation>& recomputation,
      at::TensorList inputs_and_parameters) {
    context->save_for_backward(inputs_and_parameters.vec());
    context->saved_data["recomputation"] = at::IValue::make_capsule(recomputation);
    return recomputation->run(inputs_and_parameters.slice(0, recomputation->inputs).vec());
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 const torch::autograd::variable_list& gradients) {
    TORCH_CHECK(!at::GradMode::is_enabled(),
                "recompute_in_backward: create_graph must be false, got true: activation "
                "checkpointing has no second derivative");
    std::vector<at::Tensor> saved = context->get_saved_variables();
    const auto recomputation = c10::static_intrusive_pointer_cast<Recomputation>(
        context->saved_data["recomputation"].toCapsule());
    std::vector<at::Tensor> arguments;
    for (size_t i = 0; i < recomputation->inputs; ++i) {
      saved[i] = saved[i].detach().requires_grad_(saved[i].requires_grad());
      arguments.push_back(saved[i]);
    }
    std::vector<at::Tensor> y;
    {
      const at::AutoGradMode with_gradients(true);
      recomputing = true;
      const auto done = c10::make_scope_exit([] { recomputing = false; });
      y = recomputation->run(arguments);
    }
    std::vector<at::Tensor> inputs;
    for (const at::Tensor& tensor : saved) {
      if (tensor.requires_grad()) inputs.push_back(tensor);
    }
    const auto found = torch::autograd::grad(y, inputs, gradients, /*retain_graph=*/false,
                                             /*create_graph=*/false, /*allow_unused=*/true);
    torch::autograd::variable_list result(1 + saved.size());  // first of them: the function
    for (size_t i = 0, next = 0; i < saved.size(); ++i) {
      if (saved[i].requires_grad()) result[1 + i] = found[next++];
    }
    return result;
  }
};

}  // namespace

std::vector<at::Tensor> recompute_in_backward(RecomputedFunction function,
                                              const std::vector<at::Tensor>& inputs,
                                              const std::vector<at::Tensor>& parameters) {
  if (!at::GradMode::is_enabled() || recomputing) return function(inputs);
  const auto recomputation = c10::make_intrusive<Recomputation>(std::move(function), inputs.size(),
                                                                inputs.front().device().type());
  std::vector<at::Tensor> all = inputs;
  all.insert(all.end(), parameters.begin(), parameters.end());
  return Recompute::apply(recomputation, at::TensorList(all));
}

}  // namespace gdn
