#include <tuple>

#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <gdn/kernels/cpu/norm.h>
#include <gdn/kernels/reference/norm.h>
#include <gdn/ops/common/norm.h>
#include <gdn/ops/cuda/run.h>
#include <gdn/ops/utils/autograd.h>
#include <gdn/ops/utils/check.h>
#include <gdn/ops/utils/parallel.h>
#include <gdn/ops/utils/result_memory.h>
#include <gdn/ops/utils/views.h>

namespace gdn {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor>;  // of x, gate, weight
using Pair = std::tuple<at::Tensor, at::Tensor>;                   // y and x + residual

at::Tensor call_norm(const at::Tensor& x, const std::optional<at::Tensor>& gate,
                     const std::optional<at::Tensor>& weight, double eps, bool l2) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("gdn::norm", "").typed<decltype(call_norm)>();
  return op.call(x, gate, weight, eps, l2);
}

Gradients call_norm_backward(const at::Tensor& d_y, const at::Tensor& x,
                             const std::optional<at::Tensor>& gate,
                             const std::optional<at::Tensor>& weight,
                             const std::optional<at::Tensor>& d_sum, double eps, bool l2) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("gdn::norm_backward", "")
                             .typed<decltype(call_norm_backward)>();
  return op.call(d_y, x, gate, weight, d_sum, eps, l2);
}

void check(const at::Tensor& x, const std::optional<at::Tensor>& gate,
           const std::optional<at::Tensor>& weight, bool l2) {
  const std::string_view op = l2 ? "l2_norm" : gate ? "rms_norm_gated" : "rms_norm";
  check_floating(op, "x", x);
  if (x.dim() == 0) reject(op, "x", "of shape [..., D]", describe(x));
  if (gate) {
    check_shape(op, "gate", *gate, x.sym_sizes(), "that of x");
    check_like(op, "gate", *gate, "x", x);
  }
  if (weight) {
    check_shape(op, "weight", *weight, {x.sym_size(-1)}, "[D]");
    check_parameter(op, "weight", *weight, "x", x);
  }
}

void check_residual(const at::Tensor& x, const at::Tensor& residual) {
  check_shape("add_rms_norm", "residual", residual, x.sym_sizes(), "that of x");
  check_like("add_rms_norm", "residual", residual, "x", x);
}

/// The inputs as rows; owns whatever had to be copied.
struct Inputs {
  at::Tensor x, gate, weight;

  template <typename Problem>
  Inputs(Problem& p, const at::Tensor& x_, const std::optional<at::Tensor>& gate_,
         const std::optional<at::Tensor>& weight_, double eps, bool l2)
      : x(as_rows(x_)) {
    p.M = x.size(0);
    p.D = x.size(1);
    p.kind = l2 ? kernels::NormKind::l2 : kernels::NormKind::rms;
    p.eps = eps;
    p.dtype = kernel_dtype(x.scalar_type());
    p.x = const_view2(x);
    if (gate_) {
      gate = as_rows(*gate_);
      p.gate = const_view2(gate);
    }
    if (weight_) {
      weight = weight_->contiguous();
      p.weight = weight.const_data_ptr();
      p.weight_dtype = kernel_dtype(weight.scalar_type());
    }
    p.parallel_for = torch_parallel_for;
  }
};

void run(const kernels::NormForward& p, c10::Device device) {
  if (device.is_cuda()) return cuda::run(p, device);
  p.dtype == kernels::DType::f64 ? kernels::reference::norm<double>(p) : kernels::cpu::norm(p);
}

void run(const kernels::NormBackward& p, c10::Device device) {
  if (device.is_cuda()) return cuda::run(p, device);
  p.dtype == kernels::DType::f64 ? kernels::reference::norm_backward<double>(p)
                                 : kernels::cpu::norm_backward(p);
}

at::Tensor norm(const at::Tensor& x, const std::optional<at::Tensor>& gate,
                const std::optional<at::Tensor>& weight, double eps, bool l2) {
  check(x, gate, weight, l2);
  at::Tensor y = empty_result(x.sym_sizes(), x.options());
  if (y.numel() == 0) return y;
  kernels::NormForward p;
  const Inputs inputs(p, x, gate, weight, eps, l2);
  p.y = {y.mutable_data_ptr(), p.D};
  run(p, x.device());
  return y;
}

Pair add_norm(const at::Tensor& x, const at::Tensor& residual,
              const std::optional<at::Tensor>& weight, double eps) {
  check(x, std::nullopt, weight, /*l2=*/false);
  check_residual(x, residual);
  at::Tensor y = empty_result(x.sym_sizes(), x.options());
  at::Tensor sum = empty_result(x.sym_sizes(), x.options());
  if (y.numel() == 0) return {y, sum};
  kernels::NormForward p;
  const Inputs inputs(p, x, std::nullopt, weight, eps, /*l2=*/false);
  const at::Tensor residual_rows = as_rows(residual);
  p.residual = const_view2(residual_rows);
  p.sum = {sum.mutable_data_ptr(), p.D};
  p.y = {y.mutable_data_ptr(), p.D};
  run(p, x.device());
  return {y, sum};
}

/// Gradients of absent arguments have no elements.
Gradients empty_gradients(const at::Tensor& x, const std::optional<at::Tensor>& gate,
                          const std::optional<at::Tensor>& weight) {
  const auto empty_like = [&](const std::optional<at::Tensor>& like) {
    return like ? empty_result(like->sym_sizes(), like->options()) : at::empty({0}, x.options());
  };
  return {empty_like(x), empty_like(gate), empty_like(weight)};
}

Gradients norm_backward(const at::Tensor& d_y, const at::Tensor& x,
                        const std::optional<at::Tensor>& gate,
                        const std::optional<at::Tensor>& weight,
                        const std::optional<at::Tensor>& d_sum, double eps, bool l2) {
  check(x, gate, weight, l2);
  check_shape("norm_backward", "d_y", d_y, x.sym_sizes(), "that of x");
  check_like("norm_backward", "d_y", d_y, "x", x);
  if (d_sum) {
    if (gate) reject("norm_backward", "d_sum", "absent with gate", describe(*d_sum));
    check_shape("norm_backward", "d_sum", *d_sum, x.sym_sizes(), "that of x");
    check_like("norm_backward", "d_sum", *d_sum, "x", x);
  }
  Gradients gradients = empty_gradients(x, gate, weight);
  auto& [d_x, d_gate, d_weight] = gradients;
  if (x.numel() == 0) {
    d_weight.zero_();
    return gradients;
  }
  kernels::NormBackward p;
  const Inputs inputs(p, x, gate, weight, eps, l2);
  const at::Tensor d_y_rows = as_rows(d_y);
  at::Tensor d_sum_rows, d_weight_sum;
  p.d_y = const_view2(d_y_rows);
  if (d_sum) {
    d_sum_rows = as_rows(*d_sum);
    p.d_sum = const_view2(d_sum_rows);
  }
  p.d_x = {d_x.mutable_data_ptr(), p.D};
  if (gate) p.d_gate = {d_gate.mutable_data_ptr(), p.D};
  if (weight) {
    d_weight_sum = at::empty({p.D}, x.options().dtype(statistics_dtype(x.scalar_type())));
    p.d_weight = d_weight_sum.mutable_data_ptr();
  }
  run(p, x.device());
  if (weight) d_weight = d_weight_sum.to(d_weight.scalar_type());
  return gradients;
}

at::Tensor norm_meta(const at::Tensor& x, const std::optional<at::Tensor>& gate,
                     const std::optional<at::Tensor>& weight, double /*eps*/, bool l2) {
  check(x, gate, weight, l2);
  return at::empty_symint(x.sym_sizes(), x.options());
}

Pair add_norm_meta(const at::Tensor& x, const at::Tensor& residual,
                   const std::optional<at::Tensor>& weight, double /*eps*/) {
  check(x, std::nullopt, weight, /*l2=*/false);
  check_residual(x, residual);
  return {at::empty_symint(x.sym_sizes(), x.options()),
          at::empty_symint(x.sym_sizes(), x.options())};
}

Gradients norm_backward_meta(const at::Tensor& /*d_y*/, const at::Tensor& x,
                             const std::optional<at::Tensor>& gate,
                             const std::optional<at::Tensor>& weight,
                             const std::optional<at::Tensor>& /*d_sum*/, double /*eps*/, bool l2) {
  check(x, gate, weight, l2);
  return empty_gradients(x, gate, weight);
}

class NormFunction : public torch::autograd::Function<NormFunction> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x,
                            const std::optional<at::Tensor>& gate,
                            const std::optional<at::Tensor>& weight, double eps, bool l2) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({x, saved(gate), saved(weight)});
    ctx->saved_data["eps"] = eps;
    ctx->saved_data["l2"] = l2;
    return call_norm(x, gate, weight, eps, l2);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& d_outputs) {
    const variable_list inputs = ctx->get_saved_variables();
    const auto gate = restored(inputs[1]);
    const auto weight = restored(inputs[2]);
    auto [d_x, d_gate, d_weight] =
        call_norm_backward(d_outputs[0], inputs[0], gate, weight, /*d_sum=*/std::nullopt,
                           ctx->saved_data.at("eps").toDouble(), ctx->saved_data.at("l2").toBool());
    return {d_x, gate ? d_gate : at::Tensor(), weight ? d_weight : at::Tensor(), at::Tensor(),
            at::Tensor()};
  }
};

at::Tensor norm_autograd(const at::Tensor& x, const std::optional<at::Tensor>& gate,
                         const std::optional<at::Tensor>& weight, double eps, bool l2) {
  if (needs_gradient(x, gate, weight)) return NormFunction::apply(x, gate, weight, eps, l2);
  const at::AutoDispatchBelowADInplaceOrView guard;
  return call_norm(x, gate, weight, eps, l2);
}

/// Keeps the sum; its gradient is added where that of the normed sum is computed.
class AddNormFunction : public torch::autograd::Function<AddNormFunction> {
 public:
  static variable_list forward(AutogradContext* ctx, const at::Tensor& x,
                               const at::Tensor& residual, const std::optional<at::Tensor>& weight,
                               double eps) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    auto [y, sum] = add_rms_norm(x, residual, weight, eps);
    ctx->save_for_backward({sum, saved(weight)});
    ctx->saved_data["eps"] = eps;
    ctx->set_materialize_grads(false);
    return {y, sum};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& d_outputs) {
    const at::Tensor &d_y = d_outputs[0], &d_sum = d_outputs[1];
    if (!d_y.defined()) return {d_sum, d_sum, at::Tensor(), at::Tensor()};
    const variable_list inputs = ctx->get_saved_variables();
    const auto weight = restored(inputs[1]);
    auto [d_x, d_gate, d_weight] =
        call_norm_backward(d_y, inputs[0], /*gate=*/std::nullopt, weight, restored(d_sum),
                           ctx->saved_data.at("eps").toDouble(), /*l2=*/false);
    return {d_x, d_x, weight ? d_weight : at::Tensor(), at::Tensor()};
  }
};

Pair add_norm_autograd(const at::Tensor& x, const at::Tensor& residual,
                       const std::optional<at::Tensor>& weight, double eps) {
  if (needs_gradient(x, residual, weight)) {
    const variable_list results = AddNormFunction::apply(x, residual, weight, eps);
    return {results[0], results[1]};
  }
  const at::AutoDispatchBelowADInplaceOrView guard;
  return add_rms_norm(x, residual, weight, eps);
}

/// Of two dtypes the sum takes the wider one, as in torch's addition, which reads both.
Pair add_norm_autocast(const at::Tensor& x, const at::Tensor& residual,
                       const std::optional<at::Tensor>& weight, double eps) {
  const c10::impl::ExcludeDispatchKeyGuard guard(c10::autocast_dispatch_keyset);
  if (x.scalar_type() == residual.scalar_type()) return add_rms_norm(x, residual, weight, eps);
  const at::Tensor sum = x + residual;
  return {rms_norm(sum, weight, eps), sum};
}

at::Tensor norm_autocast(const at::Tensor& x, const std::optional<at::Tensor>& gate,
                         const std::optional<at::Tensor>& weight, double eps, bool l2) {
  const c10::impl::ExcludeDispatchKeyGuard guard(c10::autocast_dispatch_keyset);
  return call_norm(x, gate ? std::optional(gate->to(x.scalar_type())) : gate, weight, eps, l2);
}

}  // namespace

at::Tensor rms_norm(const at::Tensor& x, const std::optional<at::Tensor>& weight, double eps) {
  return call_norm(x, std::nullopt, weight, eps, /*l2=*/false);
}

Pair add_rms_norm(const at::Tensor& x, const at::Tensor& residual,
                  const std::optional<at::Tensor>& weight, double eps) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("gdn::add_rms_norm", "")
                             .typed<decltype(add_rms_norm)>();
  return op.call(x, residual, weight, eps);
}

at::Tensor rms_norm_gated(const at::Tensor& x, const at::Tensor& gate,
                          const std::optional<at::Tensor>& weight, double eps) {
  return call_norm(x, gate, weight, eps, /*l2=*/false);
}

at::Tensor l2_norm(const at::Tensor& x, double eps) {
  return call_norm(x, std::nullopt, std::nullopt, eps, /*l2=*/true);
}

}  // namespace gdn

TORCH_LIBRARY_FRAGMENT(gdn, m) {
  m.def("rms_norm(Tensor x, Tensor? weight, float eps) -> Tensor", gdn::rms_norm);
  m.def("rms_norm_gated(Tensor x, Tensor gate, Tensor? weight, float eps) -> Tensor",
        gdn::rms_norm_gated);
  m.def("l2_norm(Tensor x, float eps=1e-6) -> Tensor", gdn::l2_norm);
  m.def(
      "add_rms_norm(Tensor x, Tensor residual, Tensor? weight, float eps)"
      " -> (Tensor y, Tensor sum)");
  // What the other three are made of.
  m.def("norm(Tensor x, Tensor? gate, Tensor? weight, float eps, bool l2) -> Tensor");
  m.def(
      "norm_backward(Tensor d_y, Tensor x, Tensor? gate, Tensor? weight, Tensor? d_sum, float eps,"
      " bool l2) -> (Tensor d_x, Tensor d_gate, Tensor d_weight)");
}

TORCH_LIBRARY_IMPL(gdn, CPU, m) {
  m.impl("norm", gdn::norm);
  m.impl("add_rms_norm", gdn::add_norm);
  m.impl("norm_backward", gdn::norm_backward);
}

TORCH_LIBRARY_IMPL(gdn, CUDA, m) {
  m.impl("norm", gdn::norm);
  m.impl("add_rms_norm", gdn::add_norm);
  m.impl("norm_backward", gdn::norm_backward);
}

TORCH_LIBRARY_IMPL(gdn, Meta, m) {
  m.impl("norm", gdn::norm_meta);
  m.impl("add_rms_norm", gdn::add_norm_meta);
  m.impl("norm_backward", gdn::norm_backward_meta);
}

TORCH_LIBRARY_IMPL(gdn, Autograd, m) {
  m.impl("norm", gdn::norm_autograd);
  m.impl("add_rms_norm", gdn::add_norm_autograd);
  // A second derivative is refused when it is asked for.
  m.impl("norm_backward", torch::autograd::autogradNotImplementedFallback());
}

TORCH_LIBRARY_IMPL(gdn, AutocastCPU, m) {
  m.impl("norm", gdn::norm_autocast);
  m.impl("add_rms_norm", gdn::add_norm_autocast);
}
TORCH_LIBRARY_IMPL(gdn, AutocastCUDA, m) {
  m.impl("norm", gdn::norm_autocast);
  m.impl("add_rms_norm", gdn::add_norm_autocast);
}
