#include <cmath>
#include <limits>

#include <torch/torch.h>

#include <gdn/training/optimizer.h>
#include <gdn/training/schedule.h>

#include "support.h"

namespace gdn {
namespace {

TEST(Schedule, WarmsUpAndFallsAsACosine) {
  const ScheduleOptions options = {.lr = 2.0, .warmup = 4, .steps = 104, .min_lr_ratio = 0.1};
  EXPECT_DOUBLE_EQ(learning_rate(options, 0), 0.5);
  EXPECT_DOUBLE_EQ(learning_rate(options, 3), 2.0);
  EXPECT_LT(learning_rate(options, 4), 2.0);
  EXPECT_NEAR(learning_rate(options, 53), (2.0 + 0.2) / 2, 1e-12);  // halfway from 3 to 103
  EXPECT_NEAR(learning_rate(options, 103), 0.2, 1e-12);
  EXPECT_NEAR(learning_rate(options, 1000), 0.2, 1e-12);  // a run made longer later
}

TEST(Schedule, StandsWithoutWarmUpAndWithNothingElse) {
  EXPECT_DOUBLE_EQ(learning_rate({.lr = 1, .warmup = 0, .steps = 10, .min_lr_ratio = 0}, 0), 1.0);
  EXPECT_NEAR(learning_rate({.lr = 1, .warmup = 0, .steps = 10, .min_lr_ratio = 0}, 9), 0, 1e-12);
  EXPECT_DOUBLE_EQ(learning_rate({.lr = 1, .warmup = 10, .steps = 5, .min_lr_ratio = 0}, 4), 0.5);
  EXPECT_DOUBLE_EQ(learning_rate({.lr = 1, .warmup = 0, .steps = 1, .min_lr_ratio = 0}, 0), 1.0);
}

at::Tensor parameter(at::IntArrayRef sizes, uint64_t seed) {
  torch::manual_seed(seed);
  return torch::randn(sizes).requires_grad_();
}

/// AdamW (arXiv 1711.05101, algorithm 2) in fp64.
at::Tensor plain_adamw(at::Tensor weight, const std::vector<at::Tensor>& gradients, double lr,
                       const AdamWOptions& options, double weight_decay) {
  weight = weight.to(torch::kDouble);
  at::Tensor m = torch::zeros_like(weight), v = torch::zeros_like(weight);
  for (size_t t = 1; t <= gradients.size(); ++t) {
    const at::Tensor gradient = gradients[t - 1].to(torch::kDouble);
    m = options.beta1 * m + (1 - options.beta1) * gradient;
    v = options.beta2 * v + (1 - options.beta2) * gradient * gradient;
    const at::Tensor m_hat = m / (1 - std::pow(options.beta1, static_cast<double>(t)));
    const at::Tensor v_hat = v / (1 - std::pow(options.beta2, static_cast<double>(t)));
    weight = weight - lr * (m_hat / (v_hat.sqrt() + options.eps) + weight_decay * weight);
  }
  return weight;
}

TEST(AdamW, FollowsTheAlgorithmAndDecaysMatricesOnly) {
  const at::Tensor matrix = parameter({5, 7}, 1), vector = parameter({9}, 2);
  const at::Tensor matrix0 = matrix.detach().clone(), vector0 = vector.detach().clone();
  const AdamWOptions options = {.weight_decay = 0.5};
  AdamW optimizer({{"matrix", matrix}, {"vector", vector}}, options);
  std::vector<at::Tensor> matrix_gradients, vector_gradients;
  for (int step = 0; step < 5; ++step) {
    matrix_gradients.push_back(torch::randn({5, 7}));
    vector_gradients.push_back(torch::randn({9}));
    matrix.mutable_grad() = matrix_gradients.back().clone();
    vector.mutable_grad() = vector_gradients.back().clone();
    optimizer.step(0.1);
  }
  // Five steps of about ten fp32 operations each on numbers of about one.
  const double tolerance = 50 * std::numeric_limits<float>::epsilon();
  const at::Tensor matrix_error =
      matrix.detach() - plain_adamw(matrix0, matrix_gradients, 0.1, options, 0.5);
  const at::Tensor vector_error =
      vector.detach() - plain_adamw(vector0, vector_gradients, 0.1, options, 0.0);
  EXPECT_LT(matrix_error.abs().max().item<double>(), tolerance);
  EXPECT_LT(vector_error.abs().max().item<double>(), tolerance);
}

TEST(AdamW, LeavesAParameterWithoutGradientAlone) {
  const at::Tensor used = parameter({3, 3}, 1), unused = parameter({3, 3}, 2);
  const at::Tensor before = unused.detach().clone();
  AdamW optimizer({{"used", used}, {"unused", unused}}, {.weight_decay = 0.5});
  used.mutable_grad() = torch::ones({3, 3});
  optimizer.step(0.1);
  EXPECT_TRUE(torch::equal(unused.detach(), before));
}

TEST(AdamW, ClipsByTheGlobalNorm) {
  const at::Tensor a = parameter({2, 2}, 1), b = parameter({1}, 2);
  AdamW optimizer({{"a", a}, {"b", b}}, {});
  a.mutable_grad() = torch::full({2, 2}, 2.0);  // norm 4
  b.mutable_grad() = torch::full({1}, 3.0);
  EXPECT_DOUBLE_EQ(optimizer.clip_grad_norm(0), 5.0);
  EXPECT_DOUBLE_EQ(optimizer.clip_grad_norm(6.0), 5.0);
  EXPECT_FLOAT_EQ(b.grad().item<float>(), 3.0F);
  EXPECT_DOUBLE_EQ(optimizer.clip_grad_norm(1.0), 5.0);
  EXPECT_FLOAT_EQ(b.grad().item<float>(), 0.6F);
  EXPECT_FLOAT_EQ(a.grad()[0][0].item<float>(), 0.4F);
  b.mutable_grad() = torch::full({1}, std::numeric_limits<float>::infinity());
  EXPECT_FALSE(std::isfinite(optimizer.clip_grad_norm(1.0)));
}

}  // namespace
}  // namespace gdn
