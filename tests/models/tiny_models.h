// Small configurations, inputs and comparisons that the tests of models share.
#pragma once

#include <filesystem>
#include <string>
#include <unistd.h>
#include <vector>

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <gdn/models/causal_lm.h>

namespace gdn::testing {

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

/// Equal up to `tolerance` times the largest expected magnitude; NaN is never equal.
inline void expect_close(const at::Tensor& got, const at::Tensor& expected,
                         double tolerance = kReordered) {
  ASSERT_EQ(got.sizes(), expected.sizes());
  if (got.numel() == 0) return;
  const at::Tensor error = (got.to(torch::kDouble) - expected.to(torch::kDouble)).abs();
  const double bound = tolerance * expected.abs().max().item<double>();
  ASSERT_TRUE(got.isfinite().all().item<bool>()) << "not finite";
  const auto worst = error.argmax().item<int64_t>();
  EXPECT_LE(error.max().item<double>(), bound)
      << "at flat position " << worst << ": got " << got.flatten()[worst].item<double>()
      << ", expected " << expected.flatten()[worst].item<double>();
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

/// An empty folder that goes with the object.
class TemporaryFolder {
 public:
  TemporaryFolder() {
    std::string name = (std::filesystem::temp_directory_path() / "gdn-test-XXXXXX").string();
    if (mkdtemp(name.data()) == nullptr) throw std::runtime_error("no temporary folder");
    path_ = name;
  }
  ~TemporaryFolder() { std::filesystem::remove_all(path_); }
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;

  const std::filesystem::path& path() const { return path_; }
  std::filesystem::path operator/(const std::string& name) const { return path_ / name; }

 private:
  std::filesystem::path path_;
};

/// What `action` throws as Error; fails the test when it throws nothing or another type.
template <typename Error, typename Action>
std::string message_of(Action&& action) {
  try {
    action();
  } catch (const Error& error) {
    return error.what();
  }
  ADD_FAILURE() << "nothing thrown";
  return "";
}

}  // namespace gdn::testing
