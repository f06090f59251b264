// The gated delta rule as torch operators (arXiv 2412.06464, equation 10 and section 3.3).
//
//   S_t = exp(g_t) S_{t-1} + k_t u_t^T     u_t = beta_t (v_t - exp(g_t) S_{t-1}^T k_t)
//   o_t = scale * S_t^T q_t
#pragma once

#include <cstdint>
#include <optional>
#include <tuple>

#include <ATen/core/Tensor.h>

namespace gdn {

/// Options of the gated delta rule, in the order of flash-linear-attention's keyword arguments.
struct GatedDeltaRuleOptions {
  /// Factor of the output; K^-1/2 when absent.
  std::optional<double> scale = std::nullopt;
  /// [N, HV, K, V] fp32, the state before the first token; zeros when absent.
  std::optional<at::Tensor> initial_state = std::nullopt;
  bool output_final_state = false;
  /// q and k are first divided by their L2 norm over K: x * rsqrt(sum(x^2) + 1e-6).
  bool use_qk_l2norm_in_kernel = false;
  /// `beta` holds logits: beta <- sigmoid(beta).
  bool use_beta_sigmoid_in_kernel = false;
  /// beta <- 2 sigmoid(beta): transitions may have negative eigenvalues. Requires
  /// use_beta_sigmoid_in_kernel.
  bool allow_neg_eigval = false;
  /// States are [N, HV, V, K].
  bool state_v_first = false;
  /// [N + 1] int64 or int32 on the CPU or the device of q: B is 1 and sequence n holds the tokens
  /// cu_seqlens[n] to cu_seqlens[n + 1]. Nothing passes from one sequence to the next.
  std::optional<at::Tensor> cu_seqlens = std::nullopt;
  /// `g` holds the gate's input: g <- -exp(A_log) * softplus(g + dt_bias).
  bool use_gate_in_kernel = false;
  std::optional<at::Tensor> A_log = std::nullopt;    ///< [HV] fp32, with use_gate_in_kernel.
  std::optional<at::Tensor> dt_bias = std::nullopt;  ///< [HV] fp32, with use_gate_in_kernel.
  /// Tokens per chunk of the chunked form: 16, 32, 64 or 128. The recurrent form ignores it.
  int64_t chunk_size = 64;
};

/// Chunked form: for training and prefill.
///
/// q, k [B, T, H, K]; v [B, T, HV, V]; g, beta [B, T, HV]. HV must be a multiple of H; value head h
/// uses key head h / (HV / H). q, k and v share a dtype: fp32, bf16, fp16, or fp64 (served by the
/// reference kernels, for gradient checks). g and beta are of any of these; gates, sums and states
/// are computed in fp32.
///
/// Returns o [B, T, HV, V] in the dtype of v and the final state, [N, HV, K, V] fp32 (fp64 for fp64
/// input), or no tensor unless output_final_state. Differentiable in all tensors but cu_seqlens.
/// Throws c10::ValueError naming the argument, what was expected and what came.
std::tuple<at::Tensor, std::optional<at::Tensor>> chunk_gated_delta_rule(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& g,
    const at::Tensor& beta, const GatedDeltaRuleOptions& options = {});

/// Recurrent form, token by token: for decoding. Same arguments, results and errors.
std::tuple<at::Tensor, std::optional<at::Tensor>> fused_recurrent_gated_delta_rule(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& g,
    const at::Tensor& beta, const GatedDeltaRuleOptions& options = {});

/// Recurrent form in place: `state` [N, HV, K, V] fp32 is the initial state and becomes the final
/// one; on a CPU it may be bf16, and is then rounded once a call. Takes no options.initial_state;
/// not differentiable. Returns o [B, T, HV, V].
at::Tensor fused_recurrent_gated_delta_rule_update(const at::Tensor& q, const at::Tensor& k,
                                                   const at::Tensor& v, const at::Tensor& g,
                                                   const at::Tensor& beta, at::Tensor& state,
                                                   const GatedDeltaRuleOptions& options = {});

/// Recurrent form that also returns the state after every token, [B, T, HV, K, V] fp32 (V first
/// with state_v_first): for speculative decoding, where the state of the last accepted token is
/// then states.select(1, accepted - 1). Takes no options.cu_seqlens and no output_final_state; not
/// differentiable. On a GPU it costs one write of the state a token; where that is too much memory,
/// verify without states and replay the accepted tokens with
/// fused_recurrent_gated_delta_rule_update.
std::tuple<at::Tensor, at::Tensor> fused_recurrent_gated_delta_rule_states(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& g,
    const at::Tensor& beta, const GatedDeltaRuleOptions& options = {});

/// The log decay g = -exp(A_log) * softplus(a + dt_bias), fp32. a [..., HV]; A_log, dt_bias [HV].
at::Tensor gated_delta_rule_gate(const at::Tensor& a, const at::Tensor& A_log,
                                 const at::Tensor& dt_bias);

}  // namespace gdn
