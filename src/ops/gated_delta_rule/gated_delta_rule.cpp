// The public operators: preparation of the gates by differentiable operators, then the core.
#include <string_view>

#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include <gdn/ops/gated_delta_rule/core.h>
#include <gdn/ops/gated_delta_rule/gated_delta_rule.h>
#include <gdn/ops/utils/check.h>
#include <gdn/ops/utils/views.h>

namespace gdn {
namespace {

using Form = std::tuple<at::Tensor, at::Tensor>(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& g,
    const at::Tensor& beta, std::optional<double> scale,
    const std::optional<at::Tensor>& initial_state, bool output_final_state,
    bool use_qk_l2norm_in_kernel, bool use_beta_sigmoid_in_kernel, bool allow_neg_eigval,
    bool state_v_first, const std::optional<at::Tensor>& cu_seqlens, bool use_gate_in_kernel,
    const std::optional<at::Tensor>& A_log, const std::optional<at::Tensor>& dt_bias,
    int64_t chunk_size);

using Update = at::Tensor(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                          const at::Tensor& g, const at::Tensor& beta, at::Tensor& state,
                          std::optional<double> scale, bool use_qk_l2norm_in_kernel,
                          bool use_beta_sigmoid_in_kernel, bool allow_neg_eigval,
                          bool state_v_first, const std::optional<at::Tensor>& cu_seqlens,
                          bool use_gate_in_kernel, const std::optional<at::Tensor>& A_log,
                          const std::optional<at::Tensor>& dt_bias);

void check_options(std::string_view op, const GatedDeltaRuleOptions& o, const at::Tensor& v) {
  if (o.allow_neg_eigval && !o.use_beta_sigmoid_in_kernel) {
    reject(op, "allow_neg_eigval", "false without use_beta_sigmoid_in_kernel", "true");
  }
  if (o.use_gate_in_kernel && !o.A_log) {
    reject(op, "A_log", "given with use_gate_in_kernel", "no tensor");
  }
  if (!o.use_gate_in_kernel && o.A_log) {
    reject(op, "A_log", "absent without use_gate_in_kernel", describe(*o.A_log));
  }
  if (!o.use_gate_in_kernel && o.dt_bias) {
    reject(op, "dt_bias", "absent without use_gate_in_kernel", describe(*o.dt_bias));
  }
  if (o.A_log) check_shape(op, "A_log", *o.A_log, {v.sym_size(2)}, "[HV]");
  if (o.dt_bias) check_shape(op, "dt_bias", *o.dt_bias, {v.sym_size(2)}, "[HV]");
}

/// g and beta as the core takes them.
struct Gates {
  at::Tensor g, beta;  // [B, T, HV]
};

Gates compute_gates(const at::Tensor& g, const at::Tensor& beta, const GatedDeltaRuleOptions& o,
                    at::ScalarType dtype) {
  Gates gates{g, beta.to(dtype)};
  if (o.use_gate_in_kernel) {
    gates.g = gated_delta_rule_gate(g, *o.A_log, o.dt_bias ? *o.dt_bias : at::zeros_like(*o.A_log));
  }
  gates.g = gates.g.to(dtype);
  if (o.use_beta_sigmoid_in_kernel) gates.beta = gates.beta.sigmoid();
  if (o.allow_neg_eigval) gates.beta = gates.beta * 2;
  return gates;
}

template <bool kRecurrent>
std::tuple<at::Tensor, at::Tensor> form(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& g,
    const at::Tensor& beta, std::optional<double> scale,
    const std::optional<at::Tensor>& initial_state, bool output_final_state,
    bool use_qk_l2norm_in_kernel, bool use_beta_sigmoid_in_kernel, bool allow_neg_eigval,
    bool state_v_first, const std::optional<at::Tensor>& cu_seqlens, bool use_gate_in_kernel,
    const std::optional<at::Tensor>& A_log, const std::optional<at::Tensor>& dt_bias,
    int64_t chunk_size) {
  constexpr std::string_view kOp =
      kRecurrent ? "fused_recurrent_gated_delta_rule" : "chunk_gated_delta_rule";
  GatedDeltaRuleOptions o;
  o.use_beta_sigmoid_in_kernel = use_beta_sigmoid_in_kernel;
  o.allow_neg_eigval = allow_neg_eigval;
  o.use_gate_in_kernel = use_gate_in_kernel;
  o.A_log = A_log;
  o.dt_bias = dt_bias;
  check_arguments(kOp, {q, k, v, g, beta, initial_state, cu_seqlens, scale, use_qk_l2norm_in_kernel,
                        state_v_first, chunk_size});
  check_options(kOp, o, v);
  const Gates gates = compute_gates(g, beta, o, statistics_dtype(q.scalar_type()));
  auto [out, final_state, segment_states] = gated_delta_rule_forward(
      q, k, v, gates.g, gates.beta, initial_state, cu_seqlens, scale, use_qk_l2norm_in_kernel,
      state_v_first, chunk_size, kRecurrent, output_final_state, /*save_segment_states=*/false);
  return {out, final_state};
}

at::Tensor update(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                  const at::Tensor& g, const at::Tensor& beta, at::Tensor& state,
                  std::optional<double> scale, bool use_qk_l2norm_in_kernel,
                  bool use_beta_sigmoid_in_kernel, bool allow_neg_eigval, bool state_v_first,
                  const std::optional<at::Tensor>& cu_seqlens, bool use_gate_in_kernel,
                  const std::optional<at::Tensor>& A_log,
                  const std::optional<at::Tensor>& dt_bias) {
  constexpr std::string_view kOp = "fused_recurrent_gated_delta_rule_update";
  GatedDeltaRuleOptions o;
  o.use_beta_sigmoid_in_kernel = use_beta_sigmoid_in_kernel;
  o.allow_neg_eigval = allow_neg_eigval;
  o.use_gate_in_kernel = use_gate_in_kernel;
  o.A_log = A_log;
  o.dt_bias = dt_bias;
  const std::optional<at::Tensor> initial_state = state;
  check_arguments(kOp, {q, k, v, g, beta, initial_state, cu_seqlens, scale, use_qk_l2norm_in_kernel,
                        state_v_first, o.chunk_size, "state", /*may_round_state=*/true});
  check_options(kOp, o, v);
  const Gates gates = compute_gates(g, beta, o, statistics_dtype(q.scalar_type()));
  return gated_delta_rule_update(q, k, v, gates.g, gates.beta, state, cu_seqlens, scale,
                                 use_qk_l2norm_in_kernel, state_v_first);
}

std::tuple<at::Tensor, at::Tensor> states(const at::Tensor& q, const at::Tensor& k,
                                          const at::Tensor& v, const at::Tensor& g,
                                          const at::Tensor& beta, std::optional<double> scale,
                                          const std::optional<at::Tensor>& initial_state,
                                          bool use_qk_l2norm_in_kernel,
                                          bool use_beta_sigmoid_in_kernel, bool allow_neg_eigval,
                                          bool state_v_first, bool use_gate_in_kernel,
                                          const std::optional<at::Tensor>& A_log,
                                          const std::optional<at::Tensor>& dt_bias) {
  constexpr std::string_view kOp = "fused_recurrent_gated_delta_rule_states";
  GatedDeltaRuleOptions o;
  o.use_beta_sigmoid_in_kernel = use_beta_sigmoid_in_kernel;
  o.allow_neg_eigval = allow_neg_eigval;
  o.use_gate_in_kernel = use_gate_in_kernel;
  o.A_log = A_log;
  o.dt_bias = dt_bias;
  check_arguments(kOp, {q, k, v, g, beta, initial_state, o.cu_seqlens, scale,
                        use_qk_l2norm_in_kernel, state_v_first, o.chunk_size});
  check_options(kOp, o, v);
  const Gates gates = compute_gates(g, beta, o, statistics_dtype(q.scalar_type()));
  return gated_delta_rule_token_states(q, k, v, gates.g, gates.beta, initial_state, scale,
                                       use_qk_l2norm_in_kernel, state_v_first);
}

template <typename Signature>
auto find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

std::tuple<at::Tensor, std::optional<at::Tensor>> call(const c10::TypedOperatorHandle<Form>& op,
                                                       const at::Tensor& q, const at::Tensor& k,
                                                       const at::Tensor& v, const at::Tensor& g,
                                                       const at::Tensor& beta,
                                                       const GatedDeltaRuleOptions& o) {
  auto [out, final_state] = op.call(
      q, k, v, g, beta, o.scale, o.initial_state, o.output_final_state, o.use_qk_l2norm_in_kernel,
      o.use_beta_sigmoid_in_kernel, o.allow_neg_eigval, o.state_v_first, o.cu_seqlens,
      o.use_gate_in_kernel, o.A_log, o.dt_bias, o.chunk_size);
  if (!o.output_final_state) return {out, std::nullopt};
  return {out, final_state};
}

/// Under autocast q, k and v are taken in its dtype; gates and states are not touched.
template <c10::DeviceType kDevice, typename Signature, Signature* kOperator>
struct Autocast;

template <c10::DeviceType kDevice, typename Result, typename... Rest,
          Result (*kOperator)(const at::Tensor&, const at::Tensor&, const at::Tensor&, Rest...)>
struct Autocast<kDevice, Result(const at::Tensor&, const at::Tensor&, const at::Tensor&, Rest...),
                kOperator> {
  static Result call(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, Rest... rest) {
    const c10::impl::ExcludeDispatchKeyGuard guard(
        at::autocast::get_autocast_dispatch_key_from_device_type(kDevice));
    const at::ScalarType dtype = at::autocast::get_autocast_dtype(kDevice);
    const auto cast = [dtype](const at::Tensor& tensor) {
      return at::autocast::cached_cast(dtype, tensor, kDevice);
    };
    return kOperator(cast(q), cast(k), cast(v), rest...);
  }
};

template <c10::DeviceType kDevice>
void register_autocast(torch::Library& m) {
  m.impl("chunk_gated_delta_rule", Autocast<kDevice, Form, form<false>>::call);
  m.impl("fused_recurrent_gated_delta_rule", Autocast<kDevice, Form, form<true>>::call);
  m.impl("fused_recurrent_gated_delta_rule_update", Autocast<kDevice, Update, update>::call);
  m.impl("fused_recurrent_gated_delta_rule_states",
         Autocast<kDevice, decltype(states), states>::call);
}

}  // namespace

std::tuple<at::Tensor, std::optional<at::Tensor>> chunk_gated_delta_rule(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& g,
    const at::Tensor& beta, const GatedDeltaRuleOptions& options) {
  static const auto op = find_op<Form>("gdn::chunk_gated_delta_rule");
  return call(op, q, k, v, g, beta, options);
}

std::tuple<at::Tensor, std::optional<at::Tensor>> fused_recurrent_gated_delta_rule(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& g,
    const at::Tensor& beta, const GatedDeltaRuleOptions& options) {
  static const auto op = find_op<Form>("gdn::fused_recurrent_gated_delta_rule");
  return call(op, q, k, v, g, beta, options);
}

at::Tensor fused_recurrent_gated_delta_rule_update(const at::Tensor& q, const at::Tensor& k,
                                                   const at::Tensor& v, const at::Tensor& g,
                                                   const at::Tensor& beta, at::Tensor& state,
                                                   const GatedDeltaRuleOptions& o) {
  constexpr std::string_view kOp = "fused_recurrent_gated_delta_rule_update";
  if (o.initial_state) {
    reject(kOp, "initial_state", "absent: state is the initial state", describe(*o.initial_state));
  }
  if (o.output_final_state) {
    reject(kOp, "output_final_state", "false: state becomes the final state", "true");
  }
  static const auto op = find_op<Update>("gdn::fused_recurrent_gated_delta_rule_update");
  return op.call(q, k, v, g, beta, state, o.scale, o.use_qk_l2norm_in_kernel,
                 o.use_beta_sigmoid_in_kernel, o.allow_neg_eigval, o.state_v_first, o.cu_seqlens,
                 o.use_gate_in_kernel, o.A_log, o.dt_bias);
}

std::tuple<at::Tensor, at::Tensor> fused_recurrent_gated_delta_rule_states(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& g,
    const at::Tensor& beta, const GatedDeltaRuleOptions& o) {
  constexpr std::string_view kOp = "fused_recurrent_gated_delta_rule_states";
  if (o.output_final_state) {
    reject(kOp, "output_final_state", "false: it is the last of the states", "true");
  }
  if (o.cu_seqlens) reject(kOp, "cu_seqlens", "absent", describe(*o.cu_seqlens));
  static const auto op = find_op<decltype(states)>("gdn::fused_recurrent_gated_delta_rule_states");
  return op.call(q, k, v, g, beta, o.scale, o.initial_state, o.use_qk_l2norm_in_kernel,
                 o.use_beta_sigmoid_in_kernel, o.allow_neg_eigval, o.state_v_first,
                 o.use_gate_in_kernel, o.A_log, o.dt_bias);
}

}  // namespace gdn

TORCH_LIBRARY_FRAGMENT(gdn, m) {
  const std::string form_arguments =
      "(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, float? scale=None, "
      "Tensor? initial_state=None, bool output_final_state=False, "
      "bool use_qk_l2norm_in_kernel=False, bool use_beta_sigmoid_in_kernel=False, "
      "bool allow_neg_eigval=False, bool state_v_first=False, Tensor? cu_seqlens=None, "
      "bool use_gate_in_kernel=False, Tensor? A_log=None, Tensor? dt_bias=None, "
      "int chunk_size=64) -> (Tensor o, Tensor final_state)";
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  m.def(("chunk_gated_delta_rule" + form_arguments).c_str(), tags);
  m.def(("fused_recurrent_gated_delta_rule" + form_arguments).c_str(), tags);
  m.def(
      "fused_recurrent_gated_delta_rule_update(Tensor q, Tensor k, Tensor v, Tensor g, "
      "Tensor beta, Tensor(a!) state, float? scale=None, bool use_qk_l2norm_in_kernel=False, "
      "bool use_beta_sigmoid_in_kernel=False, bool allow_neg_eigval=False, "
      "bool state_v_first=False, Tensor? cu_seqlens=None, bool use_gate_in_kernel=False, "
      "Tensor? A_log=None, Tensor? dt_bias=None) -> Tensor",
      tags);
  m.def(
      "fused_recurrent_gated_delta_rule_states(Tensor q, Tensor k, Tensor v, Tensor g, "
      "Tensor beta, float? scale=None, Tensor? initial_state=None, "
      "bool use_qk_l2norm_in_kernel=False, bool use_beta_sigmoid_in_kernel=False, "
      "bool allow_neg_eigval=False, bool state_v_first=False, bool use_gate_in_kernel=False, "
      "Tensor? A_log=None, Tensor? dt_bias=None) -> (Tensor o, Tensor states)",
      tags);
}

TORCH_LIBRARY_IMPL(gdn, CompositeImplicitAutograd, m) {
  m.impl("chunk_gated_delta_rule", gdn::form<false>);
  m.impl("fused_recurrent_gated_delta_rule", gdn::form<true>);
  m.impl("fused_recurrent_gated_delta_rule_update", gdn::update);
  m.impl("fused_recurrent_gated_delta_rule_states", gdn::states);
}

TORCH_LIBRARY_IMPL(gdn, AutocastCPU, m) { gdn::register_autocast<c10::DeviceType::CPU>(m); }
TORCH_LIBRARY_IMPL(gdn, AutocastCUDA, m) { gdn::register_autocast<c10::DeviceType::CUDA>(m); }
