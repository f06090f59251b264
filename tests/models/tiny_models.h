// Small configurations, inputs and comparisons that the tests of models share.
#pragma once

#include <string>
#include <support/files.h>
#include <support/tensor.h>
#include <vector>

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <gdn/models/causal_lm.h>

namespace gdn::testing {

using test::message_of;
using test::TestFolder;

inline GatedDeltaNetConfig tiny_config() {
  GatedDeltaNetConfig config;
  config.hidden_size = 48;
  config.head_dim = 16;
  config.num_heads = 2;
  config.num_v_heads = 4;
  config.expand_v = 1.5;
  config.num_hidden_layers = 2;
  config.intermediate_size = 64;
  config.vocab_size = 61;
  config.initializer_range = 0.3;  // activations of order one, so that mistakes show
  return config;
}

/// Gated DeltaNet, full attention and sliding-window attention with grouped queries.
inline GatedDeltaNetConfig hybrid_config() {
  GatedDeltaNetConfig config = tiny_config();
  config.num_hidden_layers = 3;
  config.attn = {{.layers = {1}, .num_heads = 4, .num_kv_heads = 2, .qk_norm = true},
                 {.layers = {2}, .num_heads = 2, .qkv_bias = true, .window_size = 5}};
  return config;
}

inline GatedDeltaNetForCausalLM make_model(const GatedDeltaNetConfig& config,
                                           bool training = false) {
  torch::manual_seed(7);
  GatedDeltaNetForCausalLM model(config);
  model->train(training);
  return model;
}

inline at::Tensor random_ids(const GatedDeltaNetConfig& config, int64_t B, int64_t T,
                             uint64_t seed = 1) {
  torch::manual_seed(seed);
  return torch::randint(config.vocab_size, {B, T}, torch::kLong);
}

/// fp32 sums in another order: a few hundred roundings, each of the values' size.
inline constexpr double kReordered = 512 * 1.2e-7;

/// Equal up to `tolerance` times the largest expected magnitude.
inline void expect_close(const at::Tensor& got, const at::Tensor& expected,
                         double tolerance = kReordered) {
  test::expect_close_to_finite(got, expected, tolerance);
}

/// The gradient of every parameter, and zeros where there is none.
inline std::vector<at::Tensor> gradients(GatedDeltaNetForCausalLM& model) {
  std::vector<at::Tensor> result;
  for (const at::Tensor& parameter : model->parameters()) {
    result.push_back(parameter.grad().defined() ? parameter.grad().clone()
                                                : torch::zeros_like(parameter));
  }
  return result;
}

}  // namespace gdn::testing
