#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <gdn/ops/common/swiglu.h>
#include <gdn/ops/utils/autograd.h>
#include <gdn/ops/utils/check.h>
#include <gdn/ops/utils/matrix_product.h>

namespace gdn {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr std::string_view kOp = "swiglu_linear";

at::Tensor composite_explicit(const at::Tensor& gate, const at::Tensor& up,
                              const at::Tensor& weight) {
  check_shape(kOp, "weight", weight, {-1, gate.sym_size(-1)}, "[out_features, D]");
  return linear_product(swiglu(gate, up), weight);
}

/// Keeps gate and up; their product, which the weight's gradient needs, is computed again.
class SwigluLinearFunction : public torch::autograd::Function<SwigluLinearFunction> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& gate, const at::Tensor& up,
                            const at::Tensor& weight) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({gate, up, weight});
    return swiglu_linear(gate, up, weight);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& d_outputs) {
    const variable_list inputs = ctx->get_saved_variables();
    const at::Tensor &gate = inputs[0], &up = inputs[1], &weight = inputs[2];
    const at::Tensor& d_output = d_outputs[0];
    at::Tensor d_weight;
    if (weight.requires_grad()) {
      const at::Tensor y = swiglu(gate, up).flatten(0, -2);
      d_weight = matrix_product(d_output.flatten(0, -2).t(), y);
    }
    auto [d_gate, d_up] = swiglu_backward(linear_product(d_output, weight.t()), gate, up);
    return {d_gate, d_up, d_weight};
  }
};

at::Tensor autograd(const at::Tensor& gate, const at::Tensor& up, const at::Tensor& weight) {
  if (needs_gradient(gate, up, weight)) return SwigluLinearFunction::apply(gate, up, weight);
  const at::AutoDispatchBelowADInplaceOrView guard;
  return swiglu_linear(gate, up, weight);
}

at::Tensor autocast(const at::Tensor& gate, const at::Tensor& up, const at::Tensor& weight) {
  const c10::impl::ExcludeDispatchKeyGuard guard(c10::autocast_dispatch_keyset);
  const c10::DeviceType device = gate.device().type();
  const at::ScalarType dtype = at::autocast::get_autocast_dtype(device);
  const auto cast = [&](const at::Tensor& x) {
    return at::autocast::cached_cast(dtype, x, device);
  };
  return swiglu_linear(cast(gate), cast(up), cast(weight));
}

}  // namespace

at::Tensor swiglu_linear(const at::Tensor& gate, const at::Tensor& up, const at::Tensor& weight) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("gdn::swiglu_linear", "")
                             .typed<decltype(swiglu_linear)>();
  return op.call(gate, up, weight);
}

}  // namespace gdn

TORCH_LIBRARY_FRAGMENT(gdn, m) {
  m.def("swiglu_linear(Tensor gate, Tensor up, Tensor weight) -> Tensor");
}

TORCH_LIBRARY_IMPL(gdn, CompositeExplicitAutograd, m) {
  m.impl("swiglu_linear", gdn::composite_explicit);
}

TORCH_LIBRARY_IMPL(gdn, Autograd, m) { m.impl("swiglu_linear", gdn::autograd); }

TORCH_LIBRARY_IMPL(gdn, AutocastCPU, m) { m.impl("swiglu_linear", gdn::autocast); }
TORCH_LIBRARY_IMPL(gdn, AutocastCUDA, m) { m.impl("swiglu_linear", gdn::autocast); }
