// Schemas of the core operators, and their calls through torch's dispatcher.
#include <torch/library.h>

#include <gdn/ops/gated_delta_rule/core.h>

namespace gdn {
namespace {

template <typename Function>
auto find_op(const char* name, Function* /*signature*/) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Function>();
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> gated_delta_rule_forward(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& g,
    const at::Tensor& beta, const std::optional<at::Tensor>& initial_state,
    const std::optional<at::Tensor>& cu_seqlens, std::optional<double> scale, bool use_qk_l2norm,
    bool state_v_first, int64_t chunk_size, bool recurrent, bool output_final_state,
    bool save_segment_states) {
  static const auto op = find_op("gdn::gated_delta_rule_forward", &gated_delta_rule_forward);
  return op.call(q, k, v, g, beta, initial_state, cu_seqlens, scale, use_qk_l2norm, state_v_first,
                 chunk_size, recurrent, output_final_state, save_segment_states);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
gated_delta_rule_backward(const at::Tensor& d_o, const std::optional<at::Tensor>& d_final_state,
                          const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                          const at::Tensor& g, const at::Tensor& beta,
                          const std::optional<at::Tensor>& initial_state,
                          const std::optional<at::Tensor>& cu_seqlens,
                          const std::optional<at::Tensor>& segment_states,
                          std::optional<double> scale, bool use_qk_l2norm, bool state_v_first,
                          int64_t chunk_size) {
  static const auto op = find_op("gdn::gated_delta_rule_backward", &gated_delta_rule_backward);
  return op.call(d_o, d_final_state, q, k, v, g, beta, initial_state, cu_seqlens, segment_states,
                 scale, use_qk_l2norm, state_v_first, chunk_size);
}

at::Tensor gated_delta_rule_update(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                   const at::Tensor& g, const at::Tensor& beta, at::Tensor& state,
                                   const std::optional<at::Tensor>& cu_seqlens,
                                   std::optional<double> scale, bool use_qk_l2norm,
                                   bool state_v_first) {
  static const auto op = find_op("gdn::gated_delta_rule_update", &gated_delta_rule_update);
  return op.call(q, k, v, g, beta, state, cu_seqlens, scale, use_qk_l2norm, state_v_first);
}

at::Tensor gated_delta_rule_step(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                 const at::Tensor& a, const at::Tensor& b, at::Tensor& state,
                                 const at::Tensor& A_log, const at::Tensor& dt_bias,
                                 bool allow_neg_eigval, std::optional<double> scale,
                                 bool use_qk_l2norm, bool state_v_first, bool overlap) {
  static const auto op = find_op("gdn::gated_delta_rule_step", &gated_delta_rule_step);
  return op.call(q, k, v, a, b, state, A_log, dt_bias, allow_neg_eigval, scale, use_qk_l2norm,
                 state_v_first, overlap);
}

std::tuple<at::Tensor, at::Tensor> gated_delta_rule_token_states(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& g,
    const at::Tensor& beta, const std::optional<at::Tensor>& initial_state,
    std::optional<double> scale, bool use_qk_l2norm, bool state_v_first) {
  static const auto op =
      find_op("gdn::gated_delta_rule_token_states", &gated_delta_rule_token_states);
  return op.call(q, k, v, g, beta, initial_state, scale, use_qk_l2norm, state_v_first);
}

}  // namespace gdn

TORCH_LIBRARY_FRAGMENT(gdn, m) {
  m.def(
      "gated_delta_rule_forward(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, "
      "Tensor? initial_state, Tensor? cu_seqlens, float? scale, bool use_qk_l2norm, "
      "bool state_v_first, int chunk_size, bool recurrent, bool output_final_state, "
      "bool save_segment_states) -> (Tensor o, Tensor final_state, Tensor segment_states)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "gated_delta_rule_backward(Tensor d_o, Tensor? d_final_state, Tensor q, Tensor k, Tensor v, "
      "Tensor g, Tensor beta, Tensor? initial_state, Tensor? cu_seqlens, Tensor? segment_states, "
      "float? scale, bool use_qk_l2norm, bool state_v_first, int chunk_size) -> "
      "(Tensor d_q, Tensor d_k, Tensor d_v, Tensor d_g, Tensor d_beta, Tensor d_initial_state)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "gated_delta_rule_update(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, "
      "Tensor(a!) state, Tensor? cu_seqlens, float? scale, bool use_qk_l2norm, "
      "bool state_v_first) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "gated_delta_rule_step(Tensor q, Tensor k, Tensor v, Tensor a, Tensor b, Tensor(a!) state, "
      "Tensor A_log, Tensor dt_bias, bool allow_neg_eigval=False, float? scale=None, "
      "bool use_qk_l2norm=True, bool state_v_first=False, bool overlap=False) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "gated_delta_rule_token_states(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, "
      "Tensor? initial_state, float? scale, bool use_qk_l2norm, bool state_v_first) -> "
      "(Tensor o, Tensor token_states)",
      {at::Tag::pt2_compliant_tag});
}
