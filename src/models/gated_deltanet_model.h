// The body of the language model: embeddings, blocks of mixer and MLP, final norm.
#pragma once

#include <cstdint>
#include <vector>

#include <torch/nn.h>

#include <gdn/layers/attention.h>
#include <gdn/layers/gated_deltanet.h>
#include <gdn/models/config.h>
#include <gdn/modules/gated_mlp.h>
#include <gdn/modules/norm.h>

namespace gdn {

/// x + attn(attn_norm(x)), then x + mlp(mlp_norm(x)); attn is Gated DeltaNet or attention. The last
/// sum is left to the next norm, which takes and gives it in one pass.
class GatedDeltaNetBlockImpl : public torch::nn::Module {
 public:
  GatedDeltaNetBlockImpl(const GatedDeltaNetConfig& config, int64_t layer);
  /// Input and result are two summands [B, T, hidden_size]: input.hidden_states and `residual`,
  /// which may be undefined.
  std::vector<at::Tensor> forward(const MixerInput& input, const at::Tensor& residual);

 private:
  RMSNorm attn_norm_{nullptr}, mlp_norm_{nullptr};
  GatedDeltaNet delta_net_{nullptr};  // one of these two is the submodule attn
  Attention attention_{nullptr};
  GatedMLP mlp_{nullptr};
};
TORCH_MODULE(GatedDeltaNetBlock);

class GatedDeltaNetModelImpl : public torch::nn::Module {
 public:
  explicit GatedDeltaNetModelImpl(const GatedDeltaNetConfig& config);

  /// input_ids [B, T] int64 -> hidden states [B, T, hidden_size]. With cu_seqlens [N + 1] B is 1.
  /// `caches`: one a layer, or null.
  at::Tensor forward(const at::Tensor& input_ids, const std::optional<at::Tensor>& cu_seqlens,
                     std::vector<LayerCache>* caches);

  Matrix embedding_matrix() const { return {embeddings_->weight, embedding_scales_}; }
  void round_embeddings_to_int8(int64_t scale_size);
  void set_activation_checkpointing(bool on) { checkpointing_ = on; }

 private:
  torch::nn::Embedding embeddings_{nullptr};
  std::optional<at::Tensor> embedding_scales_;  // of weights in int8
  torch::nn::ModuleList layers_;
  RMSNorm norm_{nullptr};
  bool checkpointing_ = false;
};

}  // namespace gdn
