#include <algorithm>
#include <string>
#include <string_view>

#include <ATen/ATen.h>

#include <gdn/layers/packing.h>
#include <gdn/models/causal_lm.h>
#include <gdn/models/gated_deltanet_model.h>
#include <gdn/modules/loss.h>
#include <gdn/ops/utils/check.h>

namespace gdn {
namespace {

constexpr const char* kName = "GatedDeltaNetForCausalLM";

void check_input(const CausalLMInput& input, const GatedDeltaNetConfig& config) {
  const at::Tensor& ids = input.input_ids;
  check_shape(kName, "input_ids", ids, {-1, -1}, "[B, T]");
  if (ids.scalar_type() != at::kLong) reject(kName, "input_ids", "int64", describe(ids));
  if (ids.is_cpu() && ids.numel() > 0) {  // on a device the look-up itself asserts
    const auto [least, greatest] = at::aminmax(ids);
    const int64_t low = least.item<int64_t>(), high = greatest.item<int64_t>();
    if (low < 0 || high >= config.vocab_size) {
      reject(kName, "input_ids",
             "from 0 to vocab_size - 1 = " + std::to_string(config.vocab_size - 1),
             std::to_string(low < 0 ? low : high));
    }
  }
  if (input.labels) {
    check_shape(kName, "labels", *input.labels, ids.sym_sizes(), "[B, T]");
    if (input.labels->scalar_type() != at::kLong) {
      reject(kName, "labels", "int64", describe(*input.labels));
    }
  }
  if (input.logits_to_keep < 0) {
    reject(kName, "logits_to_keep", "0 or more", std::to_string(input.logits_to_keep));
  }
  if (input.cu_seqlens && input.attention_mask) {
    reject(kName, "attention_mask", "absent with cu_seqlens", "both");
  }
  if (input.cu_seqlens && input.cache != nullptr) {
    reject(kName, "cache", "absent with cu_seqlens", "both");
  }
  if (input.cache != nullptr && !input.cache->layers.empty() &&
      static_cast<int64_t>(input.cache->layers.size()) != config.num_hidden_layers) {
    reject(kName, "cache", "empty or of " + std::to_string(config.num_hidden_layers) + " layers",
           std::to_string(input.cache->layers.size()) + " layers");
  }
}

}  // namespace

GatedDeltaNetForCausalLMImpl::GatedDeltaNetForCausalLMImpl(const GatedDeltaNetConfig& config,
                                                           c10::Device device, bool initialize)
    : config_(config) {
  config.validate();
  make_modules();
  move_modules(device);
  if (initialize) init_weights();
}

void GatedDeltaNetForCausalLMImpl::make_modules() {
  const SkipInitialization skip;
  model_ = register_module("model", std::make_shared<GatedDeltaNetModelImpl>(config_));
  if (!config_.tie_word_embeddings) {
    lm_head_ =
        register_module("lm_head", Linear(LinearOptions{.in_features = config_.hidden_size,
                                                        .out_features = config_.vocab_size}));
  }
}

void GatedDeltaNetForCausalLMImpl::move_modules(c10::Device device) {
  const torch::NoGradGuard no_grad;
  if (device.is_cpu()) return;
  for (const auto& module : modules(/*include_self=*/false)) {
    const bool has_values =
        module->as<Linear>() == nullptr && module->as<torch::nn::Embedding>() == nullptr;
    for (at::Tensor& parameter : module->parameters(/*recurse=*/false)) {
      parameter.set_data(has_values
                             ? parameter.to(device)
                             : at::empty(parameter.sizes(), parameter.options().device(device)));
    }
  }
}

void GatedDeltaNetForCausalLMImpl::init_weights() {
  const torch::NoGradGuard no_grad;
  const double deviation = config_.initializer_range;
  for (const auto& module :
       modules(/*include_self=*/false)) {  // norms and gates have their values already
    if (auto* linear = module->as<Linear>()) {
      linear->weight.normal_(0.0, deviation);
      if (linear->bias.defined()) linear->bias.zero_();
    } else if (auto* embedding = module->as<torch::nn::Embedding>()) {
      embedding->weight.normal_(0.0, deviation);
    } else if (auto* convolution = module->as<ShortConvolution>()) {
      convolution->weight.normal_(0.0, deviation);
    }
  }
}

CausalLMOutput GatedDeltaNetForCausalLMImpl::forward(const CausalLMInput& input) {
  check_input(input, config_);
  const int64_t B = input.input_ids.size(0), T = input.input_ids.size(1);
  at::Tensor ids = input.input_ids, labels = input.labels.value_or(at::Tensor());
  std::optional<at::Tensor> cu_seqlens;
  if (input.cu_seqlens) cu_seqlens = checked_cu_seqlens(kName, *input.cu_seqlens, B, T);

  // A padded batch is computed in packed form from here to the logits.
  std::optional<Unpadding> padding;
  if (input.attention_mask) padding = find_padding(kName, *input.attention_mask, B, T);
  if (padding) {
    cu_seqlens = padding->cu_seqlens;
    ids = padding->unpad(ids);
    if (labels.defined()) labels = padding->unpad(labels);
  }

  if (input.cache != nullptr) {
    input.cache->layers.resize(config_.num_hidden_layers);
    for (LayerCache& layer : input.cache->layers) layer.state_dtype = input.cache->state_dtype;
    input.cache->seen_tokens += T;
  }
  at::Tensor hidden_states = model_->forward(
      ids, cu_seqlens, input.cache != nullptr ? &input.cache->layers : nullptr);  // [B, T, hidden]
  const Matrix head = head_matrix();

  CausalLMOutput output;
  if (labels.defined()) {
    const at::Tensor targets = next_token_targets(labels, cu_seqlens).flatten();
    if (config_.fuse_linear_cross_entropy && !head.scales) {
      output.loss = token_linear_cross_entropy(hidden_states.flatten(0, 1), head.weight, targets);
      return output;
    }
    output.logits = multiply(hidden_states, head);  // [B, T, vocab]
    output.loss =
        token_cross_entropy(output.logits.flatten(0, 1), targets, config_.fuse_cross_entropy);
  }
  const int64_t kept = input.logits_to_keep > 0 ? std::min(input.logits_to_keep, T) : T;
  const auto keep = [&](const at::Tensor& x) {
    return (padding ? padding->repad(x) : x).narrow(1, T - kept, kept);
  };
  output.logits =
      output.logits.defined() ? keep(output.logits) : multiply(keep(hidden_states), head);
  return output;
}

void GatedDeltaNetForCausalLMImpl::set_activation_checkpointing(bool on) {
  model_->set_activation_checkpointing(on);
}

int64_t GatedDeltaNetForCausalLMImpl::parameter_count() const {
  int64_t count = 0;
  for (const at::Tensor& parameter : parameters()) count += parameter.numel();
  return count;
}

int64_t GatedDeltaNetForCausalLMImpl::nbytes() const {
  size_t bytes = 0;
  for (const at::Tensor& parameter : parameters()) bytes += parameter.nbytes();
  for (const at::Tensor& buffer : buffers()) bytes += buffer.nbytes();
  return static_cast<int64_t>(bytes);
}

std::function<void(const std::string&)> GatedDeltaNetForCausalLMImpl::int8_rounding(
    int64_t scale_size) {
  return [body = model_, modules = named_modules(), scale_size](const std::string& key) {
    if (key == "model.embeddings.weight") return body->round_embeddings_to_int8(scale_size);
    constexpr std::string_view kWeight = ".weight";
    if (!key.ends_with(kWeight)) return;
    const auto* found = modules.find(key.substr(0, key.size() - kWeight.size()));
    auto* linear = found != nullptr ? (*found)->as<Linear>() : nullptr;
    if (linear != nullptr) linear->scales = round_weight_to_int8(*linear, scale_size);
  };
}

Matrix GatedDeltaNetForCausalLMImpl::embedding_matrix() const { return model_->embedding_matrix(); }

Matrix GatedDeltaNetForCausalLMImpl::head_matrix() const {
  return lm_head_.is_empty() ? model_->embedding_matrix() : lm_head_->matrix();
}

}  // namespace gdn
