// The gate of the gated delta rule.
#include <tuple>

#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <gdn/kernels/cpu/gate.h>
#include <gdn/kernels/reference/gate.h>
#include <gdn/ops/cuda/run.h>
#include <gdn/ops/gated_delta_rule/gated_delta_rule.h>
#include <gdn/ops/utils/autograd.h>
#include <gdn/ops/utils/check.h>
#include <gdn/ops/utils/parallel.h>
#include <gdn/ops/utils/views.h>

namespace gdn {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor>;  // of a, A_log, dt_bias

constexpr std::string_view kOp = "gated_delta_rule_gate";

Gradients call_backward(const at::Tensor& d_g, const at::Tensor& a, const at::Tensor& A_log,
                        const at::Tensor& dt_bias) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("gdn::gated_delta_rule_gate_backward", "")
                             .typed<decltype(call_backward)>();
  return op.call(d_g, a, A_log, dt_bias);
}

void check(const at::Tensor& a, const at::Tensor& A_log, const at::Tensor& dt_bias) {
  check_floating(kOp, "a", a);
  if (a.dim() == 0) reject(kOp, "a", "of shape [..., HV]", describe(a));
  check_shape(kOp, "A_log", A_log, {a.sym_size(-1)}, "[HV]");
  check_shape(kOp, "dt_bias", dt_bias, {a.sym_size(-1)}, "[HV]");
  check_floating(kOp, "A_log", A_log);
  check_floating(kOp, "dt_bias", dt_bias);
}

/// The inputs as the kernels take them; owns whatever had to be copied.
struct Inputs {
  at::Tensor a, A_log, dt_bias;

  template <typename Problem>
  Inputs(Problem& p, const at::Tensor& a_, const at::Tensor& A_log_, const at::Tensor& dt_bias_)
      : a(a_.contiguous()),
        A_log(A_log_.to(statistics_dtype(a.scalar_type())).contiguous()),
        dt_bias(dt_bias_.to(statistics_dtype(a.scalar_type())).contiguous()) {
    p.HV = a.size(-1);
    p.M = a.numel() / p.HV;
    p.dtype = kernel_dtype(a.scalar_type());
    p.a = a.const_data_ptr();
    p.A_log = A_log.const_data_ptr();
    p.dt_bias = dt_bias.const_data_ptr();
    p.parallel_for = torch_parallel_for;
  }
};

at::Tensor gate_meta(const at::Tensor& a, const at::Tensor& A_log, const at::Tensor& dt_bias) {
  check(a, A_log, dt_bias);
  return at::empty_symint(a.sym_sizes(), a.options().dtype(statistics_dtype(a.scalar_type())));
}

void run(const kernels::GateForward& p, c10::Device device) {
  if (device.is_cuda()) return cuda::run(p, device);
  p.dtype == kernels::DType::f64 ? kernels::reference::gate<double>(p) : kernels::cpu::gate(p);
}

void run(const kernels::GateBackward& p, c10::Device device) {
  if (device.is_cuda()) return cuda::run(p, device);
  p.dtype == kernels::DType::f64 ? kernels::reference::gate_backward<double>(p)
                                 : kernels::cpu::gate_backward(p);
}

at::Tensor gate(const at::Tensor& a, const at::Tensor& A_log, const at::Tensor& dt_bias) {
  at::Tensor g = gate_meta(a, A_log, dt_bias);
  if (a.numel() == 0) return g;
  kernels::GateForward p;
  const Inputs inputs(p, a, A_log, dt_bias);
  p.g = g.mutable_data_ptr();
  run(p, a.device());
  return g;
}

Gradients gate_backward_meta(const at::Tensor& /*d_g*/, const at::Tensor& a,
                             const at::Tensor& A_log, const at::Tensor& dt_bias) {
  check(a, A_log, dt_bias);
  return {at::empty_symint(a.sym_sizes(), a.options()),
          at::empty_symint(A_log.sym_sizes(), A_log.options()),
          at::empty_symint(dt_bias.sym_sizes(), dt_bias.options())};
}

Gradients gate_backward(const at::Tensor& d_g, const at::Tensor& a, const at::Tensor& A_log,
                        const at::Tensor& dt_bias) {
  Gradients gradients = gate_backward_meta(d_g, a, A_log, dt_bias);
  auto& [d_a, d_A_log, d_dt_bias] = gradients;
  const at::ScalarType statistics = statistics_dtype(a.scalar_type());
  constexpr std::string_view kBackward = "gated_delta_rule_gate_backward";
  check_shape(kBackward, "d_g", d_g, a.sym_sizes(), "that of a");
  if (d_g.scalar_type() != statistics) {
    reject(kBackward, "d_g", c10::toString(statistics), describe(d_g));
  }
  if (a.numel() == 0) {
    d_A_log.zero_();
    d_dt_bias.zero_();
    return gradients;
  }
  kernels::GateBackward p;
  const Inputs inputs(p, a, A_log, dt_bias);
  const at::Tensor d_g_contiguous = d_g.contiguous();
  const at::Tensor sums = at::empty({2, p.HV}, a.options().dtype(statistics));
  p.d_g = d_g_contiguous.const_data_ptr();
  p.d_a = d_a.mutable_data_ptr();
  p.d_A_log = sums[0].mutable_data_ptr();
  p.d_dt_bias = sums[1].mutable_data_ptr();
  run(p, a.device());
  d_A_log.copy_(sums[0]);
  d_dt_bias.copy_(sums[1]);
  return gradients;
}

class GateFunction : public torch::autograd::Function<GateFunction> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& a, const at::Tensor& A_log,
                            const at::Tensor& dt_bias) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({a, A_log, dt_bias});
    return gated_delta_rule_gate(a, A_log, dt_bias);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& d_outputs) {
    const variable_list inputs = ctx->get_saved_variables();
    auto [d_a, d_A_log, d_dt_bias] = call_backward(d_outputs[0], inputs[0], inputs[1], inputs[2]);
    return {d_a, d_A_log, d_dt_bias};
  }
};

at::Tensor gate_autograd(const at::Tensor& a, const at::Tensor& A_log, const at::Tensor& dt_bias) {
  if (needs_gradient(a, A_log, dt_bias)) return GateFunction::apply(a, A_log, dt_bias);
  const at::AutoDispatchBelowADInplaceOrView guard;
  return gated_delta_rule_gate(a, A_log, dt_bias);
}

}  // namespace

at::Tensor gated_delta_rule_gate(const at::Tensor& a, const at::Tensor& A_log,
                                 const at::Tensor& dt_bias) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("gdn::gated_delta_rule_gate", "")
                             .typed<decltype(gated_delta_rule_gate)>();
  return op.call(a, A_log, dt_bias);
}

}  // namespace gdn

TORCH_LIBRARY_FRAGMENT(gdn, m) {
  m.def("gated_delta_rule_gate(Tensor a, Tensor A_log, Tensor dt_bias) -> Tensor");
  m.def(
      "gated_delta_rule_gate_backward(Tensor d_g, Tensor a, Tensor A_log, Tensor dt_bias)"
      " -> (Tensor d_a, Tensor d_A_log, Tensor d_dt_bias)");
}

TORCH_LIBRARY_IMPL(gdn, CPU, m) {
  m.impl("gated_delta_rule_gate", gdn::gate);
  m.impl("gated_delta_rule_gate_backward", gdn::gate_backward);
}

TORCH_LIBRARY_IMPL(gdn, CUDA, m) {
  m.impl("gated_delta_rule_gate", gdn::gate);
  m.impl("gated_delta_rule_gate_backward", gdn::gate_backward);
}

TORCH_LIBRARY_IMPL(gdn, Meta, m) {
  m.impl("gated_delta_rule_gate", gdn::gate_meta);
  m.impl("gated_delta_rule_gate_backward", gdn::gate_backward_meta);
}

TORCH_LIBRARY_IMPL(gdn, Autograd, m) {
  m.impl("gated_delta_rule_gate", gdn::gate_autograd);
  // A second derivative is refused when it is asked for.
  m.impl("gated_delta_rule_gate_backward", torch::autograd::autogradNotImplementedFallback());
}
