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

/// x + attn(attn_norm(x)), then x + mlp(mlp_norm(x)); attn is Gated DeltaNet or attention.
class GatedDeltaNetBlockImpl : public torch::nn::Module {
 public:
  GatedDeltaNetBlockImpl(const GatedDeltaNetConfig& config, int64_t layer);
  /// Input and result [B, T, hidden_size].
  at::Tensor forward(const MixerInput& input);

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

  const at::Tensor& embedding_weight() const { return embeddings_->weight; }  // [vocab, hidden]
  void set_activation_checkpointing(bool on) { checkpointing_ = on; }

 private:
  torch::nn::Embedding embeddings_{nullptr};
  torch::nn::ModuleList layers_;
  RMSNorm norm_{nullptr};
  bool checkpointing_ = false;
};

}  // namespace gdn
