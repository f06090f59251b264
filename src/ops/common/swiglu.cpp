#include <tuple>

#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <gdn/kernels/cpu/swiglu.h>
#include <gdn/kernels/reference/swiglu.h>
#include <gdn/ops/common/swiglu.h>
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

constexpr std::string_view kOp = "swiglu";

void check(const at::Tensor& gate, const at::Tensor& up) {
  check_floating(kOp, "gate", gate);
  if (gate.dim() == 0) reject(kOp, "gate", "of shape [..., D]", describe(gate));
  check_shape(kOp, "up", up, gate.sym_sizes(), "that of gate");
  check_like(kOp, "up", up, "gate", gate);
}

void run(const kernels::SwigluForward& p, c10::Device device) {
  if (device.is_cuda()) return cuda::run(p, device);
  p.dtype == kernels::DType::f64 ? kernels::reference::swiglu<double>(p) : kernels::cpu::swiglu(p);
}

void run(const kernels::SwigluBackward& p, c10::Device device) {
  if (device.is_cuda()) return cuda::run(p, device);
  p.dtype == kernels::DType::f64 ? kernels::reference::swiglu_backward<double>(p)
                                 : kernels::cpu::swiglu_backward(p);
}

at::Tensor swiglu_forward(const at::Tensor& gate, const at::Tensor& up) {
  check(gate, up);
  at::Tensor y = empty_result(gate.sym_sizes(), gate.options());
  if (y.numel() == 0) return y;
  const at::Tensor gate_rows = as_rows(gate);
  const at::Tensor up_rows = as_rows(up);
  kernels::SwigluForward p;
  p.M = gate_rows.size(0);
  p.D = gate_rows.size(1);
  p.dtype = kernel_dtype(gate.scalar_type());
  p.gate = const_view2(gate_rows);
  p.up = const_view2(up_rows);
  p.parallel_for = torch_parallel_for;
  p.y = {y.mutable_data_ptr(), p.D};
  run(p, gate.device());
  return y;
}

std::tuple<at::Tensor, at::Tensor> swiglu_gradients(const at::Tensor& d_y, const at::Tensor& gate,
                                                    const at::Tensor& up) {
  check(gate, up);
  check_shape("swiglu_backward", "d_y", d_y, gate.sym_sizes(), "that of gate");
  check_like("swiglu_backward", "d_y", d_y, "gate", gate);
  at::Tensor d_gate = empty_result(gate.sym_sizes(), gate.options());
  at::Tensor d_up = empty_result(gate.sym_sizes(), gate.options());
  if (gate.numel() == 0) return {d_gate, d_up};
  const at::Tensor gate_rows = as_rows(gate);
  const at::Tensor up_rows = as_rows(up);
  const at::Tensor d_y_rows = as_rows(d_y);
  kernels::SwigluBackward p;
  p.M = gate_rows.size(0);
  p.D = gate_rows.size(1);
  p.dtype = kernel_dtype(gate.scalar_type());
  p.gate = const_view2(gate_rows);
  p.up = const_view2(up_rows);
  p.parallel_for = torch_parallel_for;
  p.d_y = const_view2(d_y_rows);
  p.d_gate = {d_gate.mutable_data_ptr(), p.D};
  p.d_up = {d_up.mutable_data_ptr(), p.D};
  run(p, gate.device());
  return {d_gate, d_up};
}

at::Tensor swiglu_meta(const at::Tensor& gate, const at::Tensor& up) {
  check(gate, up);
  return at::empty_symint(gate.sym_sizes(), gate.options());
}

std::tuple<at::Tensor, at::Tensor> swiglu_backward_meta(const at::Tensor& /*d_y*/,
                                                        const at::Tensor& gate,
                                                        const at::Tensor& up) {
  check(gate, up);
  return {at::empty_symint(gate.sym_sizes(), gate.options()),
          at::empty_symint(gate.sym_sizes(), gate.options())};
}

class SwigluFunction : public torch::autograd::Function<SwigluFunction> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& gate, const at::Tensor& up) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({gate, up});
    return swiglu(gate, up);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& d_outputs) {
    const variable_list inputs = ctx->get_saved_variables();
    auto [d_gate, d_up] = swiglu_backward(d_outputs[0], inputs[0], inputs[1]);
    return {d_gate, d_up};
  }
};

at::Tensor swiglu_autograd(const at::Tensor& gate, const at::Tensor& up) {
  if (needs_gradient(gate, up)) return SwigluFunction::apply(gate, up);
  const at::AutoDispatchBelowADInplaceOrView guard;
  return swiglu(gate, up);
}

at::Tensor swiglu_autocast(const at::Tensor& gate, const at::Tensor& up) {
  const c10::impl::ExcludeDispatchKeyGuard guard(c10::autocast_dispatch_keyset);
  const at::ScalarType dtype = at::promote_types(gate.scalar_type(), up.scalar_type());
  return swiglu(gate.to(dtype), up.to(dtype));
}

}  // namespace

at::Tensor swiglu(const at::Tensor& gate, const at::Tensor& up) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("gdn::swiglu", "").typed<decltype(swiglu)>();
  return op.call(gate, up);
}

std::tuple<at::Tensor, at::Tensor> swiglu_backward(const at::Tensor& d_y, const at::Tensor& gate,
                                                   const at::Tensor& up) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("gdn::swiglu_backward", "")
                             .typed<decltype(swiglu_backward)>();
  return op.call(d_y, gate, up);
}

}  // namespace gdn

TORCH_LIBRARY_FRAGMENT(gdn, m) {
  m.def("swiglu(Tensor gate, Tensor up) -> Tensor");
  m.def("swiglu_backward(Tensor d_y, Tensor gate, Tensor up) -> (Tensor d_gate, Tensor d_up)");
}

TORCH_LIBRARY_IMPL(gdn, CPU, m) {
  m.impl("swiglu", gdn::swiglu_forward);
  m.impl("swiglu_backward", gdn::swiglu_gradients);
}

TORCH_LIBRARY_IMPL(gdn, CUDA, m) {
  m.impl("swiglu", gdn::swiglu_forward);
  m.impl("swiglu_backward", gdn::swiglu_gradients);
}

TORCH_LIBRARY_IMPL(gdn, Meta, m) {
  m.impl("swiglu", gdn::swiglu_meta);
  m.impl("swiglu_backward", gdn::swiglu_backward_meta);
}

TORCH_LIBRARY_IMPL(gdn, Autograd, m) {
  m.impl("swiglu", gdn::swiglu_autograd);
  // A second derivative is refused when it is asked for.
  m.impl("swiglu_backward", torch::autograd::autogradNotImplementedFallback());
}

TORCH_LIBRARY_IMPL(gdn, AutocastCPU, m) { m.impl("swiglu", gdn::swiglu_autocast); }
TORCH_LIBRARY_IMPL(gdn, AutocastCUDA, m) { m.impl("swiglu", gdn::swiglu_autocast); }
