// One token further for every row of a batch, in as few operators as can be.
#pragma once

#include <string>
#include <vector>

#include <ATen/core/Tensor.h>

#include <gdn/models/cache.h>
#include <gdn/models/causal_lm.h>
#include <gdn/modules/linear.h>

namespace gdn {

/// A model's decoding step over static tensors: what it queues on a GPU can be replayed as a CUDA
/// graph. Five operators a layer: input projections with norm and short convolution, the state,
/// output projection with gated norm and residual, the MLP's halves; small_batch_linear.h tells
/// how.
///
/// The weights that one product reads are laid out one after another, and the model's parameters
/// become views of them: the memory stays the same, and so do the model's keys and results.
class DecodeStep {
 public:
  /// Why a model cannot be decoded this way; empty if it can.
  static std::string why_not(const GatedDeltaNetConfig& config);

  /// `cache`: the model's, after a forward. Its tensors are taken over.
  DecodeStep(GatedDeltaNetForCausalLM& model, Cache cache);

  /// The logits [B, vocab_size] after one more token of each row, tokens [B] int64. Updates the
  /// states in place, and waits for nothing.
  at::Tensor forward(const at::Tensor& tokens);

  /// Keeps the rows `index` [B'] int64, in new tensors.
  void select_rows(const at::Tensor& index);

 private:
  struct Layer {
    at::Tensor attn_norm, conv_weight, A_log, dt_bias, o_norm, mlp_norm;
    Matrix in_proj, o_proj, gate_up_proj, down_proj;
    at::Tensor conv_state;  // [B, q, k and v channels, W - 1]
    at::Tensor state;       // [B, HV, K, V]
  };

  at::Tensor mix(Layer& layer, const at::Tensor& x);

  GatedDeltaNetConfig config_;
  std::vector<Layer> layers_;
  at::Tensor norm_;
  Matrix embeddings_, head_;
};

}  // namespace gdn
