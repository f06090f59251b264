#include <cmath>

#include <ATen/ATen.h>

#include <gdn/models/decode_step.h>
#include <gdn/ops/common/small_batch_linear.h>
#include <gdn/ops/gated_delta_rule/core.h>

namespace gdn {
namespace {

using Tensors = torch::OrderedDict<std::string, at::Tensor>;

/// Tensors [n_i, ...] one after another, [sum n_i, ...], of which they become views. Those that are
/// so already are left alone.
at::Tensor join(const Tensors& tensors, const std::string& prefix,
                const std::vector<std::string>& names, const std::string& suffix) {
  std::vector<at::Tensor> parts;
  for (const std::string& name : names) parts.push_back(tensors[prefix + name + suffix].data());
  bool joined = true;
  int64_t rows = 0, next = parts[0].storage_offset();
  for (const at::Tensor& part : parts) {
    joined = joined && part.is_contiguous() && part.is_alias_of(parts[0]) &&
             part.storage_offset() == next;
    rows += part.size(0);
    next += part.numel();
  }
  if (joined) {
    at::DimVector sizes(parts[0].sizes());
    sizes[0] = rows;
    return parts[0].as_strided(sizes, parts[0].strides());
  }
  const at::Tensor whole = at::cat(parts);
  int64_t first = 0;
  for (const std::string& name : names) {
    at::Tensor part = tensors[prefix + name + suffix];
    const int64_t count = part.size(0);
    part.set_data(whole.narrow(0, first, count));
    first += count;
  }
  return whole;
}

}  // namespace

std::string DecodeStep::why_not(const GatedDeltaNetConfig& config) {
  for (int64_t layer = 0; layer < config.num_hidden_layers; ++layer) {
    if (config.attention_of(layer) != nullptr) {
      return "layer " + std::to_string(layer) + " is attention, whose cache grows";
    }
  }
  if (!config.use_short_conv) return "its layers have no short convolution";
  return {};
}

DecodeStep::DecodeStep(GatedDeltaNetForCausalLM& model, Cache cache) : config_(model->config()) {
  const at::NoGradGuard no_grad;
  const Tensors parameters = model->named_parameters(), buffers = model->named_buffers();
  embeddings_ = model->embedding_matrix();
  norm_ = parameters["model.norm.weight"].data();
  head_ = model->head_matrix();
  for (int64_t i = 0; i < config_.num_hidden_layers; ++i) {
    const std::string prefix = "model.layers." + std::to_string(i) + ".";
    const auto get = [&](const char* name) { return parameters[prefix + name].data(); };
    const auto matrix = [&](const std::vector<std::string>& names) {
      Matrix joined{join(parameters, prefix, names, ".weight"), std::nullopt};
      if (buffers.contains(prefix + names[0] + ".scales")) {
        joined.scales = join(buffers, prefix, names, ".scales");
      }
      return joined;
    };
    std::vector<std::string> projections = {"attn.q_proj", "attn.k_proj", "attn.v_proj"};
    if (config_.use_gate) projections.emplace_back("attn.g_proj");
    projections.insert(projections.end(), {"attn.a_proj", "attn.b_proj"});
    LayerCache& cached = cache.layers[i];
    layers_.push_back({
        .attn_norm = get("attn_norm.weight"),
        .conv_weight =
            join(parameters, prefix, {"attn.q_conv1d", "attn.k_conv1d", "attn.v_conv1d"}, ".weight")
                .squeeze(1),
        .A_log = get("attn.A_log"),
        .dt_bias = get("attn.dt_bias"),
        .o_norm = get("attn.o_norm.weight"),
        .mlp_norm = get("mlp_norm.weight"),
        .in_proj = matrix(projections),
        .o_proj = matrix({"attn.o_proj"}),
        .gate_up_proj = matrix({"mlp.gate_proj", "mlp.up_proj"}),
        .down_proj = matrix({"mlp.down_proj"}),
        .conv_state = at::cat({cached.conv_q, cached.conv_k, cached.conv_v}, 1),
        .state = cached.recurrent_state.contiguous(),
    });
    cached = {};
  }
}

at::Tensor DecodeStep::forward(const at::Tensor& tokens) {
  const at::NoGradGuard no_grad;
  // A row that has no token any more (-1, see sample_tokens) goes on with any.
  at::Tensor x = embed(tokens.clamp_min(0), embeddings_, norm_.scalar_type());  // [B, hidden_size]
  for (Layer& layer : layers_) {
    x = mix(layer, x);
    const at::Tensor hidden = small_batch_linear(x, layer.gate_up_proj.weight,
                                                 {.scales = layer.gate_up_proj.scales,
                                                  .norm_weight = layer.mlp_norm,
                                                  .eps = config_.norm_eps,
                                                  .swiglu = true,
                                                  .overlap = true});
    x = small_batch_linear(hidden, layer.down_proj.weight,
                           {.scales = layer.down_proj.scales, .residual = x, .overlap = true});
  }
  return small_batch_linear(
      x, head_.weight,
      {.scales = head_.scales, .norm_weight = norm_, .eps = config_.norm_eps, .overlap = true});
}

at::Tensor DecodeStep::mix(Layer& layer, const at::Tensor& x) {
  const int64_t H = config_.num_heads, HV = config_.value_heads();
  const int64_t K = config_.head_dim, V = config_.head_v_dim();
  const at::Tensor projected = small_batch_linear(x, layer.in_proj.weight,
                                                  {.scales = layer.in_proj.scales,
                                                   .norm_weight = layer.attn_norm,
                                                   .eps = config_.norm_eps,
                                                   .conv_weight = layer.conv_weight,
                                                   .conv_state = layer.conv_state,
                                                   .overlap = true});  // [B, everything]
  int64_t column = 0;
  const auto take = [&](int64_t count) {
    column += count;
    return projected.narrow(1, column - count, count);
  };
  const auto heads = [](const at::Tensor& rows, int64_t size) {  // [B, 1, heads, size]
    return rows.unflatten(1, {1, -1, size});
  };
  const at::Tensor q = heads(take(H * K), K), k = heads(take(H * K), K), v = heads(take(HV * V), V);
  SmallBatchLinearOptions out{.scales = layer.o_proj.scales,
                              .norm_weight = layer.o_norm,
                              .eps = config_.norm_eps,
                              .residual = x,
                              .overlap = true};
  if (config_.use_gate) out.gate = take(HV * V);
  const at::Tensor a = take(HV).unsqueeze(1), b = take(HV).unsqueeze(1);  // [B, 1, HV]
  const at::Tensor o = gated_delta_rule_step(
      q, k, v, a, b, layer.state, layer.A_log, layer.dt_bias, config_.allow_neg_eigval,
      /*scale=*/std::nullopt, /*use_qk_l2norm=*/true, /*state_v_first=*/false,
      /*overlap=*/true);
  return small_batch_linear(o.flatten(1), layer.o_proj.weight, out);
}

void DecodeStep::select_rows(const at::Tensor& index) {
  for (Layer& layer : layers_) {
    layer.conv_state = layer.conv_state.index_select(0, index);
    layer.state = layer.state.index_select(0, index);
  }
}

}  // namespace gdn
