// Autograd kernels of the core operators.
#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/library.h>

#include <gdn/ops/gated_delta_rule/core.h>
#include <gdn/ops/utils/autograd.h>
#include <gdn/ops/utils/check.h>

namespace gdn {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// Keeps the inputs and the segment states for the backward, and nothing else.
class GatedDeltaRuleFunction : public torch::autograd::Function<GatedDeltaRuleFunction> {
 public:
  static variable_list forward(AutogradContext* ctx, const at::Tensor& q, const at::Tensor& k,
                               const at::Tensor& v, const at::Tensor& g, const at::Tensor& beta,
                               const std::optional<at::Tensor>& initial_state,
                               const std::optional<at::Tensor>& cu_seqlens,
                               std::optional<double> scale, bool use_qk_l2norm, bool state_v_first,
                               int64_t chunk_size, bool recurrent, bool output_final_state) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    auto [o, final_state, segment_states] = gated_delta_rule_forward(
        q, k, v, g, beta, initial_state, cu_seqlens, scale, use_qk_l2norm, state_v_first,
        chunk_size, recurrent, output_final_state, /*save_segment_states=*/!recurrent);
    ctx->save_for_backward({q, k, v, g, beta, saved(initial_state), saved(cu_seqlens),
                            recurrent ? at::Tensor() : segment_states});
    ctx->saved_data["scale"] = scale;
    ctx->saved_data["use_qk_l2norm"] = use_qk_l2norm;
    ctx->saved_data["state_v_first"] = state_v_first;
    ctx->saved_data["chunk_size"] = chunk_size;
    ctx->set_materialize_grads(false);
    if (output_final_state) {
      ctx->mark_non_differentiable({segment_states});
    } else {
      ctx->mark_non_differentiable({final_state, segment_states});
    }
    return {o, final_state, segment_states};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& d_outputs) {
    constexpr size_t kForwardArguments = 13;
    const variable_list inputs = ctx->get_saved_variables();
    const at::Tensor& v = inputs[2];
    const at::Tensor& initial_state = inputs[5];
    const at::Tensor d_o = d_outputs[0].defined() ? d_outputs[0] : at::zeros_like(v);
    const auto& options = ctx->saved_data;
    auto [d_q, d_k, d_v, d_g, d_beta, d_initial_state] = gated_delta_rule_backward(
        d_o, restored(d_outputs[1]), inputs[0], inputs[1], v, inputs[3], inputs[4],
        restored(initial_state), restored(inputs[6]), restored(inputs[7]),
        options.at("scale").toOptional<double>(), options.at("use_qk_l2norm").toBool(),
        options.at("state_v_first").toBool(), options.at("chunk_size").toInt());
    variable_list gradients(kForwardArguments);
    gradients[0] = d_q;
    gradients[1] = d_k;
    gradients[2] = d_v;
    gradients[3] = d_g;
    gradients[4] = d_beta;
    if (initial_state.defined()) gradients[5] = d_initial_state;
    return gradients;
  }
};

std::tuple<at::Tensor, at::Tensor, at::Tensor> forward_autograd(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& g,
    const at::Tensor& beta, const std::optional<at::Tensor>& initial_state,
    const std::optional<at::Tensor>& cu_seqlens, std::optional<double> scale, bool use_qk_l2norm,
    bool state_v_first, int64_t chunk_size, bool recurrent, bool output_final_state,
    bool save_segment_states) {
  if (!needs_gradient(q, k, v, g, beta, initial_state)) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return gated_delta_rule_forward(q, k, v, g, beta, initial_state, cu_seqlens, scale,
                                    use_qk_l2norm, state_v_first, chunk_size, recurrent,
                                    output_final_state, save_segment_states);
  }
  const variable_list results = GatedDeltaRuleFunction::apply(
      q, k, v, g, beta, initial_state, cu_seqlens, scale, use_qk_l2norm, state_v_first, chunk_size,
      recurrent, output_final_state);
  return {results[0], results[1], results[2]};
}

at::Tensor update_autograd(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                           const at::Tensor& g, const at::Tensor& beta, at::Tensor& state,
                           const std::optional<at::Tensor>& cu_seqlens, std::optional<double> scale,
                           bool use_qk_l2norm, bool state_v_first) {
  if (needs_gradient(q, k, v, g, beta, state)) {
    reject("fused_recurrent_gated_delta_rule_update", "every tensor",
           "without gradient (call it under no_grad, or use fused_recurrent_gated_delta_rule)",
           "requires_grad");
  }
  const at::AutoDispatchBelowADInplaceOrView guard;
  at::Tensor o = gated_delta_rule_update(q, k, v, g, beta, state, cu_seqlens, scale, use_qk_l2norm,
                                         state_v_first);
  torch::autograd::impl::bump_version(state);
  return o;
}

at::Tensor step_autograd(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                         const at::Tensor& a, const at::Tensor& b, at::Tensor& state,
                         const at::Tensor& A_log, const at::Tensor& dt_bias, bool allow_neg_eigval,
                         std::optional<double> scale, bool use_qk_l2norm, bool state_v_first,
                         bool overlap) {
  if (needs_gradient(q, k, v, a, b, state, A_log, dt_bias)) {
    reject("gated_delta_rule_step", "every tensor",
           "without gradient (call it under no_grad, or use fused_recurrent_gated_delta_rule)",
           "requires_grad");
  }
  const at::AutoDispatchBelowADInplaceOrView guard;
  at::Tensor o = gated_delta_rule_step(q, k, v, a, b, state, A_log, dt_bias, allow_neg_eigval,
                                       scale, use_qk_l2norm, state_v_first, overlap);
  torch::autograd::impl::bump_version(state);
  return o;
}

std::tuple<at::Tensor, at::Tensor> token_states_autograd(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& g,
    const at::Tensor& beta, const std::optional<at::Tensor>& initial_state,
    std::optional<double> scale, bool use_qk_l2norm, bool state_v_first) {
  if (needs_gradient(q, k, v, g, beta, initial_state)) {
    reject("fused_recurrent_gated_delta_rule_states", "every tensor",
           "without gradient (call it under no_grad, or use fused_recurrent_gated_delta_rule)",
           "requires_grad");
  }
  const at::AutoDispatchBelowADInplaceOrView guard;
  return gated_delta_rule_token_states(q, k, v, g, beta, initial_state, scale, use_qk_l2norm,
                                       state_v_first);
}

}  // namespace
}  // namespace gdn

TORCH_LIBRARY_IMPL(gdn, Autograd, m) {
  m.impl("gated_delta_rule_forward", gdn::forward_autograd);
  m.impl("gated_delta_rule_update", gdn::update_autograd);
  m.impl("gated_delta_rule_step", gdn::step_autograd);
  m.impl("gated_delta_rule_token_states", gdn::token_states_autograd);
  // A second derivative is refused when it is asked for.
  m.impl("gated_delta_rule_backward", torch::autograd::autogradNotImplementedFallback());
}
