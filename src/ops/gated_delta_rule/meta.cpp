// Meta kernels: the shapes and dtypes of the core operators' results, without computing them.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <gdn/ops/gated_delta_rule/core.h>
#include <gdn/ops/gated_delta_rule/dispatch.h>
#include <gdn/ops/utils/views.h>

namespace gdn {
namespace {

constexpr std::string_view kOp = "gated_delta_rule";

std::tuple<at::Tensor, at::Tensor, at::Tensor> forward_meta(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& g,
    const at::Tensor& beta, const std::optional<at::Tensor>& initial_state,
    const std::optional<at::Tensor>& cu_seqlens, std::optional<double> scale, bool use_qk_l2norm,
    bool state_v_first, int64_t chunk_size, bool /*recurrent*/, bool output_final_state,
    bool save_segment_states) {
  const CoreArguments a{
      q, k, v, g, beta, initial_state, cu_seqlens, scale, use_qk_l2norm, state_v_first, chunk_size};
  check_arguments(kOp, a);
  const auto states = v.options().dtype(statistics_dtype(q.scalar_type()));
  at::Tensor o = at::empty_symint(v.sym_sizes(), v.options());
  at::Tensor final_state =
      output_final_state ? at::empty_symint(state_sizes(a), states) : at::empty({0}, states);
  at::Tensor segment_states =
      save_segment_states && keeps_segment_states(q.scalar_type())
          ? at::empty_symint({segment_capacity(a), v.sym_size(2), q.sym_size(3), v.sym_size(3)},
                             v.options().dtype(at::kFloat))
          : at::empty({0}, v.options().dtype(at::kFloat));
  return {o, final_state, segment_states};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> backward_meta(
    const at::Tensor& /*d_o*/, const std::optional<at::Tensor>& /*d_final_state*/,
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& g,
    const at::Tensor& beta, const std::optional<at::Tensor>& initial_state,
    const std::optional<at::Tensor>& cu_seqlens,
    const std::optional<at::Tensor>& /*segment_states*/, std::optional<double> scale,
    bool use_qk_l2norm, bool state_v_first, int64_t chunk_size) {
  const CoreArguments a{
      q, k, v, g, beta, initial_state, cu_seqlens, scale, use_qk_l2norm, state_v_first, chunk_size};
  check_arguments(kOp, a);
  const auto gates = v.options().dtype(statistics_dtype(q.scalar_type()));
  return {at::empty_symint(q.sym_sizes(), q.options()),
          at::empty_symint(k.sym_sizes(), k.options()),
          at::empty_symint(v.sym_sizes(), v.options()),
          at::empty_symint(g.sym_sizes(), gates),
          at::empty_symint(beta.sym_sizes(), gates),
          initial_state ? at::empty_symint(state_sizes(a), gates) : at::empty({0}, gates)};
}

at::Tensor update_meta(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                       const at::Tensor& g, const at::Tensor& beta, at::Tensor& state,
                       const std::optional<at::Tensor>& cu_seqlens, std::optional<double> scale,
                       bool use_qk_l2norm, bool state_v_first) {
  const std::optional<at::Tensor> initial_state = state;
  check_arguments(kOp, {q, k, v, g, beta, initial_state, cu_seqlens, scale, use_qk_l2norm,
                        state_v_first, /*chunk_size=*/64, "state", /*may_round_state=*/true});
  return at::empty_symint(v.sym_sizes(), v.options());
}

at::Tensor step_meta(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                     const at::Tensor& a, const at::Tensor& b, at::Tensor& state,
                     const at::Tensor& /*A_log*/, const at::Tensor& /*dt_bias*/,
                     bool /*allow_neg_eigval*/, std::optional<double> scale, bool use_qk_l2norm,
                     bool state_v_first, bool /*overlap*/) {
  return update_meta(q, k, v, a, b, state, std::nullopt, scale, use_qk_l2norm, state_v_first);
}

std::tuple<at::Tensor, at::Tensor> token_states_meta(const at::Tensor& q, const at::Tensor& k,
                                                     const at::Tensor& v, const at::Tensor& g,
                                                     const at::Tensor& beta,
                                                     const std::optional<at::Tensor>& initial_state,
                                                     std::optional<double> scale,
                                                     bool use_qk_l2norm, bool state_v_first) {
  const std::optional<at::Tensor> no_cu_seqlens;
  const CoreArguments a{q,
                        k,
                        v,
                        g,
                        beta,
                        initial_state,
                        no_cu_seqlens,
                        scale,
                        use_qk_l2norm,
                        state_v_first,
                        /*chunk_size=*/64};
  check_arguments(kOp, a);
  c10::SymDimVector sizes = state_sizes(a);
  sizes.insert(sizes.begin() + 1, q.sym_size(1));
  return {at::empty_symint(v.sym_sizes(), v.options()),
          at::empty_symint(sizes, v.options().dtype(statistics_dtype(q.scalar_type())))};
}

}  // namespace
}  // namespace gdn

TORCH_LIBRARY_IMPL(gdn, Meta, m) {
  m.impl("gated_delta_rule_forward", gdn::forward_meta);
  m.impl("gated_delta_rule_backward", gdn::backward_meta);
  m.impl("gated_delta_rule_update", gdn::update_meta);
  m.impl("gated_delta_rule_step", gdn::step_meta);
  m.impl("gated_delta_rule_token_states", gdn::token_states_meta);
}
