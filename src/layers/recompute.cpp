#include <utility>

#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
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

struct Recomputation : torch::CustomClassHolder {
  Recomputation(std::function<at::Tensor(const at::Tensor&)> function, c10::DeviceType device)
      : function(std::move(function)),
        device(device),
        autocast(at::autocast::is_autocast_enabled(device)),
        dtype(at::autocast::get_autocast_dtype(device)) {}

  at::Tensor run(const at::Tensor& x) const {
    const AutocastScope scope(device, autocast, dtype);
    return function(x);
  }

  std::function<at::Tensor(const at::Tensor&)> function;
  c10::DeviceType device;
  bool autocast;
  at::ScalarType dtype;
};

class Recompute : public torch::autograd::Function<Recompute> {
 public:
  static at::Tensor forward(torch::autograd::AutogradContext* context,
                            const c10::intrusive_ptr<Recomputation>& recomputation,
                            const at::Tensor& x, at::TensorList parameters) {
    std::vector<at::Tensor> saved{x};
    saved.insert(saved.end(), parameters.begin(), parameters.end());
    context->save_for_backward(std::move(saved));
    context->saved_data["recomputation"] = at::IValue::make_capsule(recomputation);
    return recomputation->run(x);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 const torch::autograd::variable_list& gradients) {
    TORCH_CHECK(!at::GradMode::is_enabled(),
                "recompute_in_backward: create_graph must be false, got true: activation "
                "checkpointing has no second derivative");
    std::vector<at::Tensor> saved = context->get_saved_variables();
    saved[0] = saved[0].detach().requires_grad_(saved[0].requires_grad());
    const auto recomputation = c10::static_intrusive_pointer_cast<Recomputation>(
        context->saved_data["recomputation"].toCapsule());
    at::Tensor y;
    {
      const at::AutoGradMode with_gradients(true);
      y = recomputation->run(saved[0]);
    }
    std::vector<at::Tensor> inputs;
    for (const at::Tensor& tensor : saved) {
      if (tensor.requires_grad()) inputs.push_back(tensor);
    }
    const auto found = torch::autograd::grad({y}, inputs, {gradients[0]}, /*retain_graph=*/false,
                                             /*create_graph=*/false, /*allow_unused=*/true);
    torch::autograd::variable_list result(1 + saved.size());  // first of them: the function
    for (size_t i = 0, next = 0; i < saved.size(); ++i) {
      if (saved[i].requires_grad()) result[1 + i] = found[next++];
    }
    return result;
  }
};

}  // namespace

at::Tensor recompute_in_backward(std::function<at::Tensor(const at::Tensor&)> function,
                                 const at::Tensor& x, const std::vector<at::Tensor>& parameters) {
  if (!at::GradMode::is_enabled()) return function(x);
  const auto recomputation =
      c10::make_intrusive<Recomputation>(std::move(function), x.device().type());
  return Recompute::apply(recomputation, x, at::TensorList(parameters));
}

}  // namespace gdn
