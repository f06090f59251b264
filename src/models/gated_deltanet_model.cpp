#include <tuple>

#include <gdn/layers/recompute.h>
#include <gdn/models/gated_deltanet_model.h>

namespace gdn {

GatedDeltaNetBlockImpl::GatedDeltaNetBlockImpl(const GatedDeltaNetConfig& config, int64_t layer) {
  const RMSNormOptions norm{
      .size = config.hidden_size, .eps = config.norm_eps, .fused = config.fuse_norm};
  attn_norm_ = register_module("attn_norm", RMSNorm(norm));
  if (const AttentionConfig* attn = config.attention_of(layer)) {
    attention_ =
        register_module("attn", Attention(AttentionOptions{.hidden_size = config.hidden_size,
                                                           .num_heads = attn->num_heads,
                                                           .num_kv_heads = attn->num_kv_heads,
                                                           .qkv_bias = attn->qkv_bias,
                                                           .qk_norm = attn->qk_norm,
                                                           .window_size = attn->window_size,
                                                           .rope_theta = attn->rope_theta}));
  } else {
    delta_net_ = register_module(
        "attn", GatedDeltaNet(GatedDeltaNetOptions{.hidden_size = config.hidden_size,
                                                   .expand_v = config.expand_v,
                                                   .head_dim = config.head_dim,
                                                   .num_heads = config.num_heads,
                                                   .num_v_heads = config.num_v_heads,
                                                   .mode = config.attn_mode,
                                                   .use_gate = config.use_gate,
                                                   .use_short_conv = config.use_short_conv,
                                                   .allow_neg_eigval = config.allow_neg_eigval,
                                                   .conv_size = config.conv_size,
                                                   .norm_eps = config.norm_eps}));
  }
  mlp_norm_ = register_module("mlp_norm", RMSNorm(norm));
  mlp_ = register_module("mlp", GatedMLP(GatedMLPOptions{.hidden_size = config.hidden_size,
                                                         .intermediate_size = config.mlp_size(),
                                                         .fuse_swiglu = config.fuse_swiglu}));
}

std::vector<at::Tensor> GatedDeltaNetBlockImpl::forward(const MixerInput& input,
                                                        const at::Tensor& residual) {
  MixerInput mixer = input;
  at::Tensor sum;
  std::tie(mixer.hidden_states, sum) = attn_norm_->prenorm(input.hidden_states, residual);
  at::Tensor normed;
  std::tie(normed, sum) =
      mlp_norm_->prenorm(attention_.is_empty() ? delta_net_(mixer) : attention_(mixer), sum);
  return {mlp_(normed), sum};
}

GatedDeltaNetModelImpl::GatedDeltaNetModelImpl(const GatedDeltaNetConfig& config) {
  // The weight is given, so that torch draws no values for it.
  embeddings_ = register_module(
      "embeddings",
      torch::nn::Embedding(torch::nn::EmbeddingOptions(config.vocab_size, config.hidden_size)
                               ._weight(torch::empty({config.vocab_size, config.hidden_size}))));
  layers_ = register_module("layers", torch::nn::ModuleList());
  for (int64_t layer = 0; layer < config.num_hidden_layers; ++layer) {
    layers_->push_back(GatedDeltaNetBlock(config, layer));
  }
  norm_ = register_module(
      "norm", RMSNorm(RMSNormOptions{
                  .size = config.hidden_size, .eps = config.norm_eps, .fused = config.fuse_norm}));
}

void GatedDeltaNetModelImpl::round_embeddings_to_int8(int64_t scale_size) {
  embedding_scales_ = round_weight_to_int8(*embeddings_, scale_size);
}

at::Tensor GatedDeltaNetModelImpl::forward(const at::Tensor& input_ids,
                                           const std::optional<at::Tensor>& cu_seqlens,
                                           std::vector<LayerCache>* caches) {
  // Their sum: [B, T, hidden_size], and after the first layer the residual of the same shape.
  std::vector<at::Tensor> summands = {
      embed(input_ids, embedding_matrix(), norm_->weight.scalar_type())};
  for (size_t i = 0; i < layers_->size(); ++i) {
    const auto layer = layers_->ptr<GatedDeltaNetBlockImpl>(i);
    const auto run = [layer, cu_seqlens, cache = caches != nullptr ? &(*caches)[i] : nullptr](
                         const std::vector<at::Tensor>& x) {
      return layer->forward({.hidden_states = x[0], .cu_seqlens = cu_seqlens, .cache = cache},
                            x.size() > 1 ? x[1] : at::Tensor());
    };
    const bool recompute = checkpointing_ && caches == nullptr;
    summands =
        recompute ? recompute_in_backward(run, summands, layer->parameters()) : run(summands);
  }
  return std::get<0>(norm_->prenorm(summands[0], summands.size() > 1 ? summands[1] : at::Tensor()));
}

}  // namespace gdn
