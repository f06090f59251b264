// Gated DeltaNet as a causal language model.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>

#include <torch/nn.h>

#include <gdn/models/cache.h>
#include <gdn/models/config.h>
#include <gdn/modules/linear.h>

namespace gdn {

struct CausalLMInput {
  at::Tensor input_ids;  ///< [B, T] int64
  /// [B, T] int64 or bool, 1 for tokens, 0 for padding, which must be on the left: padded positions
  /// change neither states nor later outputs.
  std::optional<at::Tensor> attention_mask = std::nullopt;
  /// [N + 1]: packed sequences, B is 1.
  std::optional<at::Tensor> cu_seqlens = std::nullopt;
  /// [B, T] int64, aligned with input_ids: position t's logits are compared with labels[t + 1],
  /// never across two packed sequences. -100 is ignored.
  std::optional<at::Tensor> labels = std::nullopt;
  /// Read and updated in place.
  Cache* cache = nullptr;
  /// Logits of only the last n positions; 0: of all.
  int64_t logits_to_keep = 0;
};

struct CausalLMOutput {
  at::Tensor logits;  ///< [B, T or logits_to_keep, vocab_size]; undefined with labels and
                      ///< fuse_linear_cross_entropy
  at::Tensor loss;    ///< scalar fp32, mean over counted labels; undefined without labels
};

/// The body: embeddings, layers, final norm. State-dict keys embeddings, layers.N.*, norm.
class GatedDeltaNetModelImpl;

/// State-dict keys model.* and lm_head.weight (absent when tied).
class GatedDeltaNetForCausalLMImpl : public torch::nn::Module {
 public:
  /// Random weights are drawn on `device`, from its default generator; with `initialize` false
  /// they are left without values, for a caller that loads them.
  explicit GatedDeltaNetForCausalLMImpl(const GatedDeltaNetConfig& config,
                                        c10::Device device = c10::kCPU, bool initialize = true);

  CausalLMOutput forward(const CausalLMInput& input);

  const GatedDeltaNetConfig& config() const { return config_; }
  /// Like torch's, save that A_log and dt_bias stay fp32: to(kBFloat16) is safe.
  using torch::nn::Module::to;
  /// Recomputes each layer's activations in the backward instead of keeping them.
  void set_activation_checkpointing(bool on);
  int64_t parameter_count() const;
  int64_t nbytes() const;  ///< of parameters and of the scales of those in int8
  /// What rounds the parameter of a key to int8 if it is a matrix that tokens are multiplied by or
  /// looked up in: projections, embeddings and head. From then on the model computes on a CPU and
  /// without gradients. `scale_size`: see round_to_int8.
  std::function<void(const std::string& key)> int8_rounding(int64_t scale_size);
  Matrix embedding_matrix() const;  ///< [vocab_size, hidden_size]
  Matrix head_matrix() const;       ///< the same if tied

 private:
  void make_modules();
  void move_modules(c10::Device device);
  void init_weights();

  GatedDeltaNetConfig config_;
  std::shared_ptr<GatedDeltaNetModelImpl> model_;
  Linear lm_head_{nullptr};
};
TORCH_MODULE(GatedDeltaNetForCausalLM);

}  // namespace gdn
