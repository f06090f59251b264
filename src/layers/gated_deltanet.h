// The Gated DeltaNet token mixer (arXiv 2412.06464).
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include <torch/nn.h>

#include <gdn/layers/mixer_input.h>
#include <gdn/modules/linear.h>
#include <gdn/modules/norm.h>
#include <gdn/modules/short_convolution.h>

namespace gdn {

struct GatedDeltaNetOptions {
  int64_t hidden_size = 2048;
  double expand_v = 2.0;                              ///< V / K
  int64_t head_dim = 256;                             ///< K
  int64_t num_heads = 6;                              ///< H
  std::optional<int64_t> num_v_heads = std::nullopt;  ///< HV; num_heads when absent
  std::string mode = "chunk";                         ///< or "fused_recurrent"
  bool use_gate = true;
  bool use_short_conv = true;
  bool allow_neg_eigval = false;
  int64_t conv_size = 4;
  bool conv_bias = false;
  double norm_eps = 1e-5;
  /// In training without a cache, keep the projections alone and compute what lies between them and
  /// o_proj again in the backward. Absent: on GPUs, where that is about a thirtieth of a step.
  std::optional<bool> recompute = std::nullopt;
};

/// o_proj(norm(gated delta rule(conv(q), conv(k), conv(v), a, b))). In evaluation, sequences of at
/// most 64 tokens take the recurrent form whatever the mode.
class GatedDeltaNetImpl : public torch::nn::Cloneable<GatedDeltaNetImpl> {
 public:
  explicit GatedDeltaNetImpl(const GatedDeltaNetOptions& options);
  void reset() override;
  /// A_log ~ log U(0, 16); softplus(dt_bias) log-uniform in [1e-3, 1e-1].
  void reset_gate_parameters();

  at::Tensor forward(const MixerInput& input);  // [B, T, hidden_size]

  /// A_log and dt_bias stay fp32 when the rest goes to a narrower dtype.
  void to(torch::Device device, torch::Dtype dtype, bool non_blocking = false) override;
  void to(torch::Dtype dtype, bool non_blocking = false) override;
  using torch::nn::Module::to;

  GatedDeltaNetOptions options;
  Linear q_proj{nullptr}, k_proj{nullptr}, v_proj{nullptr};
  Linear a_proj{nullptr}, b_proj{nullptr}, g_proj{nullptr}, o_proj{nullptr};
  at::Tensor A_log, dt_bias;  // [HV] fp32
  ShortConvolution q_conv1d{nullptr}, k_conv1d{nullptr}, v_conv1d{nullptr};

 private:
  at::Tensor mix(const at::Tensor& hidden_states, const std::optional<at::Tensor>& cu_seqlens,
                 LayerCache* cache);
  at::Tensor mix_projections(const std::vector<at::Tensor>& projections,
                             const std::optional<at::Tensor>& cu_seqlens, LayerCache* cache);
  std::vector<at::Tensor> mixing_parameters() const;
  at::Tensor gated_delta_rule(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                              const at::Tensor& a, const at::Tensor& b,
                              const std::optional<at::Tensor>& cu_seqlens, LayerCache* cache);

  int64_t value_heads_ = 0, head_v_dim_ = 0;  // HV, V
  FusedRMSNormGated gated_norm_{nullptr};     // o_norm with the gate,
  RMSNorm plain_norm_{nullptr};               // and without
};
TORCH_MODULE(GatedDeltaNet);

}  // namespace gdn
