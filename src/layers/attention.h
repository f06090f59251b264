// Softmax attention for hybrid models: full or sliding window, grouped queries, rotary positions.
#pragma once

#include <cstdint>
#include <optional>

#include <torch/nn.h>

#include <gdn/layers/mixer_input.h>
#include <gdn/modules/linear.h>
#include <gdn/modules/norm.h>
#include <gdn/modules/rotary.h>

namespace gdn {

struct AttentionOptions {
  int64_t hidden_size = 2048;
  int64_t num_heads = 32;
  std::optional<int64_t> num_kv_heads = std::nullopt;  ///< num_heads when absent
  bool qkv_bias = false;
  bool qk_norm = false;  ///< RMSNorm over each head of q and k
  std::optional<int64_t> window_size =
      std::nullopt;  ///< tokens that a token sees, itself included; all if absent
  double rope_theta = 10000.0;
};

/// The products are torch's scaled_dot_product_attention.
class AttentionImpl : public torch::nn::Cloneable<AttentionImpl> {
 public:
  explicit AttentionImpl(const AttentionOptions& options);
  void reset() override;
  at::Tensor forward(const MixerInput& input);  // [B, T, hidden_size]

  AttentionOptions options;
  Linear q_proj{nullptr}, k_proj{nullptr}, v_proj{nullptr}, o_proj{nullptr};
  RMSNorm q_norm{nullptr}, k_norm{nullptr};

 private:
  at::Tensor mix(const at::Tensor& hidden_states, const std::optional<at::Tensor>& cu_seqlens,
                 LayerCache* cache);

  int64_t head_dim_ = 0, kv_heads_ = 0;
  RotaryEmbedding rotary_;
};
TORCH_MODULE(Attention);

}  // namespace gdn
