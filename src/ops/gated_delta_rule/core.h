// The operators beneath chunk_gated_delta_rule and fused_recurrent_gated_delta_rule, on gates that
// are already computed: g and beta in fp32 (fp64 for fp64 input).
#pragma once

#include <cstdint>
#include <optional>
#include <string_view>
#include <tuple>

#include <ATen/core/Tensor.h>

namespace gdn {

/// What every core operator is given, by reference for the time of a call. Shapes and meanings are
/// those of chunk_gated_delta_rule.
struct CoreArguments {
  const at::Tensor& q;
  const at::Tensor& k;
  const at::Tensor& v;
  const at::Tensor& g;
  const at::Tensor& beta;
  const std::optional<at::Tensor>& initial_state;
  const std::optional<at::Tensor>& cu_seqlens;
  std::optional<double> scale;
  bool use_qk_l2norm;
  bool state_v_first;
  int64_t chunk_size;
  std::string_view state_name = "initial_state";  // in error messages
  bool may_round_state = false;  // to bf16, on a CPU: the state is updated in place
};

/// Throws c10::ValueError unless shapes, devices, options and the dtypes of q, k, v and the state
/// fit together. Sizes may be symbolic; the values of cu_seqlens are not read.
void check_arguments(std::string_view op, const CoreArguments& a);

/// Number of sequences.
c10::SymInt sequence_count(const CoreArguments& a);

/// [N, HV, K, V], or [N, HV, V, K] with the V dimension first; and how messages call it.
c10::SymDimVector state_sizes(const CoreArguments& a);
inline std::string_view state_dimensions(const CoreArguments& a) {
  return a.state_v_first ? "[N, HV, V, K]" : "[N, HV, K, V]";
}

/// Room for the segment states, known from shapes alone: with cu_seqlens their number depends on
/// the values, and the last ones of this many may be unused (they are zero).
c10::SymInt segment_capacity(const CoreArguments& a);

/// o, the final state ([0] unless output_final_state) and the segment states ([0] unless saved),
/// which the backward needs. Differentiable; the Autograd kernel saves the segment states itself.
std::tuple<at::Tensor, at::Tensor, at::Tensor> gated_delta_rule_forward(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& g,
    const at::Tensor& beta, const std::optional<at::Tensor>& initial_state,
    const std::optional<at::Tensor>& cu_seqlens, std::optional<double> scale, bool use_qk_l2norm,
    bool state_v_first, int64_t chunk_size, bool recurrent, bool output_final_state,
    bool save_segment_states);

/// The gradients of q, k, v, g, beta and of the initial state ([0] when there is none). Computes
/// the segment states first when they are absent.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
gated_delta_rule_backward(const at::Tensor& d_o, const std::optional<at::Tensor>& d_final_state,
                          const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                          const at::Tensor& g, const at::Tensor& beta,
                          const std::optional<at::Tensor>& initial_state,
                          const std::optional<at::Tensor>& cu_seqlens,
                          const std::optional<at::Tensor>& segment_states,
                          std::optional<double> scale, bool use_qk_l2norm, bool state_v_first,
                          int64_t chunk_size);

/// The recurrent form in place on `state`. Not differentiable.
at::Tensor gated_delta_rule_update(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                   const at::Tensor& g, const at::Tensor& beta, at::Tensor& state,
                                   const std::optional<at::Tensor>& cu_seqlens,
                                   std::optional<double> scale, bool use_qk_l2norm,
                                   bool state_v_first);

/// The recurrent form in place on `state`, and the gates on the way: a and b [B, T, HV] of q's
/// dtype, g = -exp(A_log) softplus(a + dt_bias), beta = sigmoid(b), twice that with
/// allow_neg_eigval; A_log and dt_bias [HV] fp32. One kernel on a GPU; with `overlap` the state may
/// be read there while the work queued just before still runs, which must not write it then. Not
/// differentiable.
at::Tensor gated_delta_rule_step(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                 const at::Tensor& a, const at::Tensor& b, at::Tensor& state,
                                 const at::Tensor& A_log, const at::Tensor& dt_bias,
                                 bool allow_neg_eigval, std::optional<double> scale,
                                 bool use_qk_l2norm, bool state_v_first, bool overlap);

/// The recurrent form, and the state after every token: [B, T, HV, K, V], or V first. Not
/// differentiable.
std::tuple<at::Tensor, at::Tensor> gated_delta_rule_token_states(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& g,
    const at::Tensor& beta, const std::optional<at::Tensor>& initial_state,
    std::optional<double> scale, bool use_qk_l2norm, bool state_v_first);

}  // namespace gdn
