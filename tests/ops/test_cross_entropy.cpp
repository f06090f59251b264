// cross_entropy and linear_cross_entropy as torch operators.
#include <support/operators.h>
#include <support/tensor.h>

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <gdn/ops/common/cross_entropy.h>

namespace gdn::test {
namespace {

constexpr std::array<Reduction, 3> kReductions = {Reduction::mean, Reduction::sum, Reduction::none};

at::Tensor plain(const at::Tensor& logits, const at::Tensor& target, Reduction reduction) {
  const at::Tensor wide = logits.scalar_type() == at::kDouble ? logits : logits.to(at::kFloat);
  const int64_t kind = reduction == Reduction::mean  ? at::Reduction::Mean
                       : reduction == Reduction::sum ? at::Reduction::Sum
                                                     : at::Reduction::None;
  return at::cross_entropy_loss(wide, target, {}, kind, kIgnoreIndex);
}

class CrossEntropy : public testing::Test {
 protected:
  void SetUp() override { torch::manual_seed(1); }

  static at::Tensor random_target(int64_t M, int64_t vocabulary) {
    at::Tensor target = torch::randint(vocabulary, {M}, at::kLong);
    if (M > 1) target[1] = kIgnoreIndex;
    return target;
  }
};
using LinearCrossEntropy = CrossEntropy;

TEST_F(CrossEntropy, MatchesPlainTorchInEveryDtype) {
  for (const Reduction reduction : kReductions) {
    expect_matches_plain(
        [&](const auto& in) { return cross_entropy(in[0], in[1], kIgnoreIndex, reduction); },
        [&](const auto& in) { return plain(in[0], in[1], reduction); },
        {torch::randn({9, 77}, at::kDouble), random_target(9, 77)}, "cross_entropy");
  }
}

TEST_F(CrossEntropy, GradientsMatchFiniteDifferences) {
  for (const Reduction reduction : kReductions) {
    expect_gradients(
        [&](const auto& in) { return cross_entropy(in[0], in[1], kIgnoreIndex, reduction); },
        {torch::randn({4, 5}, at::kDouble), random_target(4, 5)}, "cross_entropy");
  }
}

TEST_F(CrossEntropy, WithNoRowCountedLossAndGradientsAreZero) {
  const at::Tensor target = torch::full({3}, kIgnoreIndex, at::kLong);
  const at::Tensor logits = torch::randn({3, 8}).requires_grad_();
  const at::Tensor loss = cross_entropy(logits, target);
  EXPECT_EQ(loss.item<float>(), 0);
  loss.backward();
  EXPECT_TRUE(torch::equal(logits.grad(), torch::zeros({3, 8})));
  const at::Tensor hidden = torch::randn({3, 4}).requires_grad_();
  const at::Tensor linear_loss = linear_cross_entropy(hidden, torch::randn({8, 4}), target);
  EXPECT_EQ(linear_loss.item<float>(), 0);
  linear_loss.backward();
  EXPECT_TRUE(torch::equal(hidden.grad(), torch::zeros({3, 4})));
}

TEST_F(CrossEntropy, AnyStridesGiveTheSameBits) {
  const at::Tensor target = random_target(6, 10);
  const at::Tensor wide = torch::randn({6, 30});
  for (const at::Tensor& logits : {wide.narrow(1, 10, 10), torch::randn({10, 6}).t()}) {
    expect_same_bits([](const auto& in) { return cross_entropy(in[0], in[1]); }, {logits, target},
                     {logits.contiguous(), target});
  }
}

TEST_F(CrossEntropy, ThreadsDoNotChangeBits) {
  expect_threads_agree([](const auto& in) { return cross_entropy(in[0], in[1]); },
                       {torch::randn({300, 333}), random_target(300, 333)});
}

TEST_F(CrossEntropy, EmptyTensorsWork) {
  const at::Tensor target = torch::empty({0}, at::kLong);
  const at::Tensor logits = torch::empty({0, 5}).requires_grad_();
  const at::Tensor loss = cross_entropy(logits, target);
  EXPECT_EQ(loss.item<float>(), 0);
  loss.backward();
  EXPECT_EQ(logits.grad().sizes(), logits.sizes());
  const at::Tensor weight = torch::randn({5, 3}).requires_grad_();
  linear_cross_entropy(torch::empty({0, 3}), weight, target).backward();
  EXPECT_TRUE(torch::equal(weight.grad(), torch::zeros({5, 3})));
}

TEST_F(CrossEntropy, RejectsWhatItCannotTake) {
  const at::Tensor logits = torch::randn({3, 5});
  const at::Tensor target = torch::tensor({0, 4, 2});
  expect_rejected([&] { cross_entropy(logits, torch::tensor({0, 5, 2})); }, "target[1]", "5");
  expect_rejected([&] { cross_entropy(logits, torch::tensor({0, -1, 2})); }, "target[1]", "-1");
  expect_rejected([&] { cross_entropy(logits, target.narrow(0, 0, 2)); }, "target", "[2]");
  expect_rejected([&] { cross_entropy(logits, target.to(at::kInt)); }, "target", "Int");
  expect_rejected([&] { cross_entropy(logits.unsqueeze(0), target); }, "logits", "[1, 3, 5]");
  const at::Tensor hidden = torch::randn({3, 4});
  const at::Tensor weight = torch::randn({5, 4});
  expect_rejected(
      [&] {
        linear_cross_entropy(hidden, torch::randn({5, 3}), target);
      },
      "weight", "[5, 3]");
  expect_rejected([&] { linear_cross_entropy(hidden, weight.to(at::kHalf), target); }, "weight",
                  "Half");
  expect_rejected(
      [&] {
        linear_cross_entropy(hidden, weight, torch::tensor({0, 9, 1}));
      },
      "target[1]", "9");
  expect_rejected(
      [&] {
        linear_cross_entropy(hidden, weight, target, kIgnoreIndex, Reduction::mean,
                             /*rows_per_block=*/0);
      },
      "rows_per_block", "0");
}

TEST_F(LinearCrossEntropy, MatchesPlainTorchInEveryDtype) {
  const Tensors inputs = {torch::randn({10, 16}, at::kDouble),
                          torch::randn({33, 16}, at::kDouble) / 4, random_target(10, 33)};
  for (const Reduction reduction : kReductions) {
    for (const int64_t rows_per_block : {1, 4, 10, 1024}) {
      expect_matches_plain(
          [&](const auto& in) {
            return linear_cross_entropy(in[0], in[1], in[2], kIgnoreIndex, reduction,
                                        rows_per_block);
          },
          [&](const auto& in) { return plain(torch::mm(in[0], in[1].t()), in[2], reduction); },
          inputs, "rows_per_block " + std::to_string(rows_per_block));
    }
  }
}

TEST_F(LinearCrossEntropy, GradientsMatchFiniteDifferences) {
  for (const Reduction reduction : kReductions) {
    expect_gradients(
        [&](const auto& in) {
          return linear_cross_entropy(in[0], in[1], in[2], kIgnoreIndex, reduction, 3);
        },
        {torch::randn({4, 3}, at::kDouble), torch::randn({5, 3}, at::kDouble), random_target(4, 5)},
        "linear_cross_entropy");
  }
}

TEST_F(LinearCrossEntropy, WithoutGradientIsTheSameLoss) {
  const at::Tensor hidden = torch::randn({9, 8});
  const at::Tensor weight = torch::randn({20, 8});
  const at::Tensor target = random_target(9, 20);
  const at::Tensor trained = hidden.clone().requires_grad_();
  EXPECT_TRUE(torch::equal(linear_cross_entropy(hidden, weight, target),
                           linear_cross_entropy(trained, weight, target)));
}

TEST_F(LinearCrossEntropy, AutocastKeepsTheWeightsGradientInFp32) {
  const at::Tensor hidden = torch::randn({9, 8}).requires_grad_();
  const at::Tensor weight = torch::randn({20, 8}).requires_grad_();
  const at::Tensor target = random_target(9, 20);
  const at::Tensor low = hidden.detach().to(at::kBFloat16);
  const at::Tensor want = linear_cross_entropy(low, weight.detach(), target);
  const AutocastBf16 autocast;
  const at::Tensor loss = linear_cross_entropy(hidden, weight, target, kIgnoreIndex,
                                               Reduction::mean, /*rows_per_block=*/3);
  EXPECT_TRUE(torch::equal(loss, want)) << "the product was not computed in bf16";
  loss.backward();
  EXPECT_EQ(weight.grad().scalar_type(), at::kFloat);
  EXPECT_EQ(hidden.grad().scalar_type(), at::kFloat);
  EXPECT_FALSE(torch::equal(weight.grad(), weight.grad().to(at::kBFloat16).to(at::kFloat)))
      << "the sum over blocks was rounded to bf16";
}

TEST_F(LinearCrossEntropy, MetaKernelsKnowTheShapes) {
  for (const Reduction reduction : kReductions) {
    expect_meta_agrees(
        [&](const auto& in) {
          return linear_cross_entropy(in[0], in[1], in[2], kIgnoreIndex, reduction);
        },
        {torch::randn({4, 3}), torch::randn({5, 3}), random_target(4, 5)});
  }
}

}  // namespace
}  // namespace gdn::test
