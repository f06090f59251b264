// The layer and the language model in torch's own operators and a loop over tokens, from the
// weights by their keys: what a user would write first, in any dtype.
#pragma once

#include <map>
#include <string>
#include <support/gated_delta_rule_tensors.h>

#include <torch/torch.h>

#include <gdn/models/config.h>

namespace gdn::testing {

using Weights = std::map<std::string, at::Tensor>;

/// Detached copies in `dtype`, the gates' parameters in at least fp32, as a layer keeps them.
inline Weights weights_of(const torch::nn::Module& module, at::ScalarType dtype) {
  Weights weights;
  for (const auto& named : module.named_parameters()) {
    const bool gate = named.key().ends_with("A_log") || named.key().ends_with("dt_bias");
    const auto wide = at::promote_types(dtype, at::kFloat);
    weights[named.key()] = named.value().detach().to(gate ? wide : dtype);
  }
  return weights;
}

inline at::Tensor plain_norm(const at::Tensor& x, const at::Tensor& weight, double eps) {
  return x * torch::rsqrt(x.pow(2).mean(-1, true) + eps) * weight;
}

/// x [B, T, hidden_size] through the layer whose keys begin with `prefix`. Options are those of a
/// layer or a model's configuration, which have the same names.
template <typename Options>
at::Tensor plain_gated_deltanet(const Weights& weights, const std::string& prefix,
                                const Options& options, const at::Tensor& x) {
  const int64_t K = options.head_dim, HV = options.num_v_heads.value_or(options.num_heads);
  const auto weight = [&](const std::string& key) { return weights.at(prefix + key); };
  const auto project = [&](const std::string& name) {
    return torch::matmul(x, weight(name + "_proj.weight").t());
  };
  const auto mix_tokens = [&](const std::string& name, int64_t width) {
    at::Tensor y = project(name);  // [B, T, channels]
    if (options.use_short_conv) {
      const at::Tensor taps = weight(name + "_conv1d.weight");  // [channels, 1, W]
      const auto bias = weights.find(prefix + name + "_conv1d.bias");
      const at::Tensor padded =
          torch::constant_pad_nd(y.transpose(1, 2), {options.conv_size - 1, 0});
      y = torch::conv1d(padded, taps, bias == weights.end() ? at::Tensor() : bias->second,
                        at::IntArrayRef(1), at::IntArrayRef(0), at::IntArrayRef(1), taps.size(0))
              .transpose(1, 2);
    }
    return torch::silu(y).unflatten(-1, {-1, width});
  };
  test::GatedDeltaRuleTensors rule;
  const int64_t V = weight("v_proj.weight").size(0) / HV;
  const auto wide = weight("A_log").scalar_type();
  rule.q = mix_tokens("q", K);
  rule.k = mix_tokens("k", K);
  rule.v = mix_tokens("v", V);
  rule.g = -weight("A_log").exp() * torch::softplus(project("a").to(wide) + weight("dt_bias"));
  rule.beta = torch::sigmoid(project("b").to(wide)) * (options.allow_neg_eigval ? 2 : 1);
  rule.initial_state = torch::zeros({x.size(0), HV, K, V}, wide);
  GatedDeltaRuleOptions rule_options;
  rule_options.use_qk_l2norm_in_kernel = true;
  const at::Tensor o = test::plain_gated_delta_rule(rule, rule_options).o;  // [B, T, HV, V]
  at::Tensor normed = plain_norm(o, weight("o_norm.weight"), options.norm_eps);
  if (options.use_gate) normed = normed * torch::silu(project("g").unflatten(-1, {-1, V}));
  return torch::matmul(normed.flatten(-2), weight("o_proj.weight").t());
}

/// Logits [B, T, vocab_size] of a model without attention.
inline at::Tensor plain_logits(const Weights& weights, const GatedDeltaNetConfig& config,
                               const at::Tensor& ids) {
  at::Tensor x = weights.at("model.embeddings.weight").index({ids});  // [B, T, hidden_size]
  for (int64_t i = 0; i < config.num_hidden_layers; ++i) {
    const std::string layer = "model.layers." + std::to_string(i) + ".";
    const auto norm = [&](const std::string& name) {
      return plain_norm(x, weights.at(layer + name + ".weight"), config.norm_eps);
    };
    const auto mlp = [&](const std::string& name, const at::Tensor& y) {
      return torch::matmul(y, weights.at(layer + "mlp." + name + "_proj.weight").t());
    };
    x = x + plain_gated_deltanet(weights, layer + "attn.", config, norm("attn_norm"));
    const at::Tensor y = norm("mlp_norm");
    x = x + mlp("down", torch::silu(mlp("gate", y)) * mlp("up", y));
  }
  x = plain_norm(x, weights.at("model.norm.weight"), config.norm_eps);
  return torch::matmul(x, weights.at("lm_head.weight").t());
}

/// `got` is at most twice as far from `exact`, which is fp64, as `plain` in the same dtype is.
inline void expect_as_good_as_plain(const at::Tensor& got, const at::Tensor& plain,
                                    const at::Tensor& exact) {
  ASSERT_EQ(got.scalar_type(), plain.scalar_type());
  ASSERT_EQ(got.sizes(), exact.sizes());
  const auto error = [&](const at::Tensor& x) {
    return ((x.to(at::kDouble) - exact).norm() / exact.norm()).item<double>();
  };
  EXPECT_LE(error(got), 2 * error(plain)) << "of plain operators: " << error(plain);
}

}  // namespace gdn::testing
