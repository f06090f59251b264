#include <string_view>
#include <tuple>
#include <vector>

#include <ATen/ATen.h>
#include <c10/util/StringUtil.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <gdn/kernels/cpu/short_convolution.h>
#include <gdn/kernels/reference/short_convolution.h>
#include <gdn/ops/common/causal_conv1d.h>
#include <gdn/ops/cuda/run.h>
#include <gdn/ops/utils/autograd.h>
#include <gdn/ops/utils/check.h>
#include <gdn/ops/utils/cu_seqlens.h>
#include <gdn/ops/utils/parallel.h>
#include <gdn/ops/utils/result_memory.h>
#include <gdn/ops/utils/views.h>

namespace gdn {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

using OptionalTensor = std::optional<at::Tensor>;
using ActivationName = std::optional<std::string_view>;
// Of x, weight, bias and initial_state.
using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

constexpr std::string_view kOp = "causal_conv1d";
constexpr std::string_view kUpdate = "causal_conv1d_update";

std::tuple<at::Tensor, at::Tensor> call_forward(const at::Tensor& x, const at::Tensor& weight,
                                                const OptionalTensor& bias,
                                                ActivationName activation,
                                                const OptionalTensor& initial_state,
                                                bool output_final_state,
                                                const OptionalTensor& cu_seqlens) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("gdn::causal_conv1d", "")
                             .typed<decltype(call_forward)>();
  return op.call(x, weight, bias, activation, initial_state, output_final_state, cu_seqlens);
}

Gradients call_backward(const at::Tensor& d_y, const OptionalTensor& d_final_state,
                        const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                        ActivationName activation, const OptionalTensor& initial_state,
                        const OptionalTensor& cu_seqlens) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("gdn::causal_conv1d_backward", "")
                             .typed<decltype(call_backward)>();
  return op.call(d_y, d_final_state, x, weight, bias, activation, initial_state, cu_seqlens);
}

at::Tensor call_update(const at::Tensor& x, at::Tensor& state, const at::Tensor& weight,
                       const OptionalTensor& bias, ActivationName activation) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("gdn::causal_conv1d_update", "")
                             .typed<decltype(call_update)>();
  return op.call(x, state, weight, bias, activation);
}

ActivationName name_of(Activation activation) {
  return activation == Activation::silu ? ActivationName("silu") : std::nullopt;
}

bool is_silu(std::string_view op, ActivationName activation) {
  if (!activation) return false;
  if (*activation != "silu" && *activation != "swish") {
    reject(op, "activation", "'silu', 'swish' or None", c10::str("'", *activation, "'"));
  }
  return true;
}

c10::SymInt sequence_count(const at::Tensor& x, const OptionalTensor& cu_seqlens) {
  return cu_seqlens ? cu_seqlens->sym_size(0) - 1 : x.sym_size(0);
}

void check(std::string_view op, const at::Tensor& x, const at::Tensor& weight,
           const OptionalTensor& bias, std::string_view state_name, const OptionalTensor& state,
           const OptionalTensor& cu_seqlens) {
  check_shape(op, "x", x, {-1, -1, -1}, "[B, T, D]");
  check_floating(op, "x", x);
  const c10::SymInt D = x.sym_size(2);
  check_shape(op, "weight", weight, {D, -1}, "[D, W]");
  check_parameter(op, "weight", weight, "x", x);
  const c10::SymInt W = weight.sym_size(1);
  if (W < kernels::kMinTaps || W > kernels::kMaxTaps) {
    reject(op, "weight", "of shape [D, W] with 2 <= W <= 8", describe(weight));
  }
  if (bias) {
    check_shape(op, "bias", *bias, {D}, "[D]");
    check_like(op, "bias", *bias, "weight", weight);
  }
  if (cu_seqlens && cu_seqlens->dim() != 1) {
    reject(op, "cu_seqlens", "of shape [N + 1]", describe(*cu_seqlens));
  }
  if (state) {
    check_shape(op, state_name, *state, {sequence_count(x, cu_seqlens), D, W - 1}, "[N, D, W - 1]");
    check_like(op, state_name, *state, "x", x);
  }
}

/// The inputs as the kernels take them; owns whatever had to be copied.
struct Inputs {
  at::Tensor x, weight, bias, initial_state;
  std::optional<SequenceBoundaries> cu_seqlens;

  template <typename Problem>
  Inputs(Problem& p, std::string_view op, const at::Tensor& x_, const at::Tensor& weight_,
         const OptionalTensor& bias_, ActivationName activation,
         const OptionalTensor& initial_state_, const OptionalTensor& cu_seqlens_)
      : x(with_contiguous_rows(x_)), weight(weight_.contiguous()) {
    p.B = x.size(0);
    p.T = x.size(1);
    p.D = x.size(2);
    p.W = weight.size(1);
    p.N = p.B;
    p.silu = is_silu(op, activation);
    p.dtype = kernel_dtype(x.scalar_type());
    p.weight_dtype = kernel_dtype(weight.scalar_type());
    p.x = const_view3(x);
    p.weight = weight.const_data_ptr();
    if (cu_seqlens_) {
      cu_seqlens.emplace(op, *cu_seqlens_, p.B, p.T, x.device());
      p.cu_seqlens = cu_seqlens->data();
      p.N = cu_seqlens->sequences();
    }
    if (bias_) {
      bias = bias_->contiguous();
      p.bias = bias.const_data_ptr();
    }
    if (initial_state_) {
      initial_state = initial_state_->contiguous();
      p.initial_state = initial_state.const_data_ptr();
    }
    p.parallel_for = torch_parallel_for;
  }
};

void run(const kernels::ShortConvolutionForward& p, c10::Device device) {
  if (device.is_cuda()) return cuda::run(p, device);
  if (p.dtype == kernels::DType::f64) return kernels::reference::short_convolution<double>(p);
  kernels::cpu::short_convolution(p);
}

void run(const kernels::ShortConvolutionBackward& p, c10::Device device) {
  if (device.is_cuda()) return cuda::run(p, device);
  p.dtype == kernels::DType::f64 ? kernels::reference::short_convolution_backward<double>(p)
                                 : kernels::cpu::short_convolution_backward(p);
}

/// A final state that is not wanted has no sequences.
at::Tensor empty_final_state(const at::Tensor& x, const at::Tensor& weight, bool wanted,
                             const OptionalTensor& cu_seqlens) {
  const c10::SymInt N = wanted ? sequence_count(x, cu_seqlens) : c10::SymInt(0);
  return at::empty_symint({N, x.sym_size(2), weight.sym_size(1) - 1}, x.options());
}

std::tuple<at::Tensor, at::Tensor> forward(const at::Tensor& x, const at::Tensor& weight,
                                           const OptionalTensor& bias, ActivationName activation,
                                           const OptionalTensor& initial_state,
                                           bool output_final_state,
                                           const OptionalTensor& cu_seqlens) {
  check(kOp, x, weight, bias, "initial_state", initial_state, cu_seqlens);
  kernels::ShortConvolutionForward p;
  const Inputs inputs(p, kOp, x, weight, bias, activation, initial_state, cu_seqlens);
  at::Tensor y = empty_result(x.sym_sizes(), x.options());
  at::Tensor final_state = empty_final_state(x, weight, output_final_state, cu_seqlens);
  p.y = mutable_view3(y);
  if (output_final_state) p.final_state = final_state.mutable_data_ptr();
  run(p, x.device());
  return {y, final_state};
}

/// Gradients of absent arguments have no elements.
Gradients empty_gradients(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                          const OptionalTensor& initial_state) {
  const auto empty_like = [&](const OptionalTensor& like) {
    return like ? empty_result(like->sym_sizes(), like->options()) : at::empty({0}, x.options());
  };
  return {empty_like(x), empty_like(weight), empty_like(bias), empty_like(initial_state)};
}

Gradients backward(const at::Tensor& d_y, const OptionalTensor& d_final_state, const at::Tensor& x,
                   const at::Tensor& weight, const OptionalTensor& bias, ActivationName activation,
                   const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens) {
  constexpr std::string_view kBackward = "causal_conv1d_backward";
  check(kBackward, x, weight, bias, "initial_state", initial_state, cu_seqlens);
  check_shape(kBackward, "d_y", d_y, x.sym_sizes(), "that of x");
  check_like(kBackward, "d_y", d_y, "x", x);
  kernels::ShortConvolutionBackward p;
  const Inputs inputs(p, kBackward, x, weight, bias, activation, initial_state, cu_seqlens);
  const at::Tensor d_y_rows = with_contiguous_rows(d_y);
  p.d_y = const_view3(d_y_rows);
  at::Tensor d_final;
  if (d_final_state) {
    check_shape(kBackward, "d_final_state", *d_final_state, {p.N, p.D, p.W - 1}, "[N, D, W - 1]");
    check_like(kBackward, "d_final_state", *d_final_state, "x", x);
    d_final = d_final_state->contiguous();
    p.d_final_state = d_final.const_data_ptr();
  }
  Gradients gradients = empty_gradients(x, weight, bias, initial_state);
  auto& [d_x, d_weight, d_bias, d_initial_state] = gradients;
  const auto sums = x.options().dtype(statistics_dtype(x.scalar_type()));
  const at::Tensor d_weight_sum = at::empty(weight.sizes(), sums);
  const at::Tensor d_bias_sum = at::empty(bias ? bias->sizes() : at::IntArrayRef({0}), sums);
  p.d_x = mutable_view3(d_x);
  p.d_weight = d_weight_sum.mutable_data_ptr();
  if (bias) p.d_bias = d_bias_sum.mutable_data_ptr();
  if (initial_state) p.d_initial_state = d_initial_state.mutable_data_ptr();
  run(p, x.device());
  d_weight = d_weight_sum.to(d_weight.scalar_type());
  d_bias = d_bias_sum.to(d_bias.scalar_type());
  return gradients;
}

at::Tensor update(const at::Tensor& x, at::Tensor& state, const at::Tensor& weight,
                  const OptionalTensor& bias, ActivationName activation) {
  if (x.defined() && x.dim() == 2) {
    return update(x.unsqueeze(1), state, weight, bias, activation).squeeze(1);
  }
  check(kUpdate, x, weight, bias, "state", state, std::nullopt);
  kernels::ShortConvolutionForward p;
  const Inputs inputs(p, kUpdate, x, weight, bias, activation, state, std::nullopt);
  at::Tensor y = at::empty(x.sizes(), x.options());
  p.y = mutable_view3(y);
  p.final_state = inputs.initial_state.mutable_data_ptr();
  run(p, x.device());
  if (!inputs.initial_state.is_same(state)) state.copy_(inputs.initial_state);
  return y;
}

std::tuple<at::Tensor, at::Tensor> forward_meta(const at::Tensor& x, const at::Tensor& weight,
                                                const OptionalTensor& bias,
                                                ActivationName activation,
                                                const OptionalTensor& initial_state,
                                                bool output_final_state,
                                                const OptionalTensor& cu_seqlens) {
  check(kOp, x, weight, bias, "initial_state", initial_state, cu_seqlens);
  is_silu(kOp, activation);
  return {at::empty_symint(x.sym_sizes(), x.options()),
          empty_final_state(x, weight, output_final_state, cu_seqlens)};
}

Gradients backward_meta(const at::Tensor& /*d_y*/, const OptionalTensor& /*d_final_state*/,
                        const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                        ActivationName /*activation*/, const OptionalTensor& initial_state,
                        const OptionalTensor& /*cu_seqlens*/) {
  return empty_gradients(x, weight, bias, initial_state);
}

at::Tensor update_meta(const at::Tensor& x, at::Tensor& state, const at::Tensor& weight,
                       const OptionalTensor& bias, ActivationName activation) {
  check(kUpdate, x.dim() == 2 ? x.unsqueeze(1) : x, weight, bias, "state", state, std::nullopt);
  is_silu(kUpdate, activation);
  return at::empty_symint(x.sym_sizes(), x.options());
}

class CausalConv1dFunction : public torch::autograd::Function<CausalConv1dFunction> {
 public:
  static variable_list forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& weight,
                               const OptionalTensor& bias, const OptionalTensor& initial_state,
                               const OptionalTensor& cu_seqlens, bool silu,
                               bool output_final_state) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({x, weight, saved(bias), saved(initial_state), saved(cu_seqlens)});
    ctx->saved_data["silu"] = silu;
    ctx->set_materialize_grads(false);
    auto [y, final_state] = call_forward(x, weight, bias, activation_name(silu), initial_state,
                                         output_final_state, cu_seqlens);
    if (!output_final_state) ctx->mark_non_differentiable({final_state});
    return {y, final_state};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& d_outputs) {
    const variable_list inputs = ctx->get_saved_variables();
    const auto bias = restored(inputs[2]);
    const auto initial_state = restored(inputs[3]);
    const at::Tensor d_y = d_outputs[0].defined() ? d_outputs[0] : at::zeros_like(inputs[0]);
    auto [d_x, d_weight, d_bias, d_initial_state] = call_backward(
        d_y, restored(d_outputs[1]), inputs[0], inputs[1], bias,
        activation_name(ctx->saved_data.at("silu").toBool()), initial_state, restored(inputs[4]));
    return {d_x,
            d_weight,
            bias ? d_bias : at::Tensor(),
            initial_state ? d_initial_state : at::Tensor(),
            at::Tensor(),
            at::Tensor(),
            at::Tensor()};
  }

 private:
  static ActivationName activation_name(bool silu) {
    return name_of(silu ? Activation::silu : Activation::none);
  }
};

std::tuple<at::Tensor, at::Tensor> forward_autograd(const at::Tensor& x, const at::Tensor& weight,
                                                    const OptionalTensor& bias,
                                                    ActivationName activation,
                                                    const OptionalTensor& initial_state,
                                                    bool output_final_state,
                                                    const OptionalTensor& cu_seqlens) {
  if (!needs_gradient(x, weight, bias, initial_state)) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return call_forward(x, weight, bias, activation, initial_state, output_final_state, cu_seqlens);
  }
  const variable_list results = CausalConv1dFunction::apply(
      x, weight, bias, initial_state, cu_seqlens, is_silu(kOp, activation), output_final_state);
  return {results[0], results[1]};
}

at::Tensor update_autograd(const at::Tensor& x, at::Tensor& state, const at::Tensor& weight,
                           const OptionalTensor& bias, ActivationName activation) {
  if (needs_gradient(x, state, weight, bias)) {
    reject(kUpdate, "every tensor", "without gradient (call it under no_grad, or causal_conv1d)",
           "requires_grad");
  }
  const at::AutoDispatchBelowAutograd guard;  // keeps ADInplaceOrView, which counts the mutation
  return call_update(x, state, weight, bias, activation);
}

}  // namespace

std::tuple<at::Tensor, std::optional<at::Tensor>> causal_conv1d(
    const at::Tensor& x, const at::Tensor& weight, const CausalConv1dOptions& options) {
  auto [y, final_state] =
      call_forward(x, weight, options.bias, name_of(options.activation), options.initial_state,
                   options.output_final_state, options.cu_seqlens);
  return {y, options.output_final_state ? OptionalTensor(final_state) : std::nullopt};
}

at::Tensor causal_conv1d_update(const at::Tensor& x, at::Tensor& state, const at::Tensor& weight,
                                const std::optional<at::Tensor>& bias, Activation activation) {
  return call_update(x, state, weight, bias, name_of(activation));
}

}  // namespace gdn

TORCH_LIBRARY_FRAGMENT(gdn, m) {
  // final_state is [0, D, W - 1] unless output_final_state.
  m.def(
      "causal_conv1d(Tensor x, Tensor weight, Tensor? bias=None, str? activation=None,"
      " Tensor? initial_state=None, bool output_final_state=False, Tensor? cu_seqlens=None)"
      " -> (Tensor y, Tensor final_state)");
  m.def(
      "causal_conv1d_backward(Tensor d_y, Tensor? d_final_state, Tensor x, Tensor weight,"
      " Tensor? bias, str? activation, Tensor? initial_state, Tensor? cu_seqlens)"
      " -> (Tensor d_x, Tensor d_weight, Tensor d_bias, Tensor d_initial_state)");
  m.def(
      "causal_conv1d_update(Tensor x, Tensor(a!) state, Tensor weight, Tensor? bias=None,"
      " str? activation=None) -> Tensor");
}

TORCH_LIBRARY_IMPL(gdn, CPU, m) {
  m.impl("causal_conv1d", gdn::forward);
  m.impl("causal_conv1d_backward", gdn::backward);
  m.impl("causal_conv1d_update", gdn::update);
}

TORCH_LIBRARY_IMPL(gdn, CUDA, m) {
  m.impl("causal_conv1d", gdn::forward);
  m.impl("causal_conv1d_backward", gdn::backward);
  m.impl("causal_conv1d_update", gdn::update);
}

TORCH_LIBRARY_IMPL(gdn, Meta, m) {
  m.impl("causal_conv1d", gdn::forward_meta);
  m.impl("causal_conv1d_backward", gdn::backward_meta);
  m.impl("causal_conv1d_update", gdn::update_meta);
}

TORCH_LIBRARY_IMPL(gdn, Autograd, m) {
  m.impl("causal_conv1d", gdn::forward_autograd);
  m.impl("causal_conv1d_update", gdn::update_autograd);
  // A second derivative is refused when it is asked for.
  m.impl("causal_conv1d_backward", torch::autograd::autogradNotImplementedFallback());
}
