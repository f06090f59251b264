// rms_norm, rms_norm_gated and l2_norm as torch operators.
#include <optional>
#include <support/operators.h>
#include <support/tensor.h>

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <gdn/ops/common/norm.h>

namespace gdn::test {
namespace {

constexpr double kEps = 1e-5;

at::Tensor plain_rms_norm(const at::Tensor& x, const at::Tensor& weight) {
  return x * torch::rsqrt(x.pow(2).mean(-1, true) + kEps) * weight;
}

class Norm : public testing::Test {
 protected:
  void SetUp() override { torch::manual_seed(1); }
};

TEST_F(Norm, MatchesPlainTorchInEveryDtype) {
  for (const int64_t D : {2, 7, 64, 130}) {
    const at::Tensor x = torch::randn({3, 5, D}, at::kDouble);
    const at::Tensor gate = torch::randn({3, 5, D}, at::kDouble);
    const at::Tensor weight = torch::randn({D}, at::kDouble);
    expect_matches_plain([](const auto& in) { return rms_norm(in[0], in[1], kEps); },
                         [](const auto& in) { return plain_rms_norm(in[0], in[1]); }, {x, weight},
                         "rms_norm");
    expect_matches_plain(
        [](const auto& in) { return rms_norm_gated(in[0], in[1], in[2], kEps); },
        [](const auto& in) { return plain_rms_norm(in[0], in[2]) * torch::silu(in[1]); },
        {x, gate, weight}, "rms_norm_gated");
    const at::Tensor weights = torch::randn({2, 3, 5, D}, at::kDouble);  // of the two results
    expect_matches_plain(
        [&](const auto& in) {
          const auto [y, sum] = add_rms_norm(in[0], in[1], in[2], kEps);
          return torch::stack({y, sum}) * weights.to(y.scalar_type());
        },
        [&](const auto& in) {
          const at::Tensor sum = in[0] + in[1];
          return torch::stack({plain_rms_norm(sum, in[2]), sum}) * weights.to(sum.scalar_type());
        },
        {x, gate, weight}, "add_rms_norm");
    expect_matches_plain(
        [](const auto& in) { return l2_norm(in[0]); },
        [](const auto& in) { return in[0] * torch::rsqrt(in[0].pow(2).sum(-1, true) + 1e-6); }, {x},
        "l2_norm");
  }
}

TEST_F(Norm, WithoutWeightIsWithOnes) {
  const at::Tensor x = torch::randn({4, 9});
  EXPECT_TRUE(torch::equal(rms_norm(x, std::nullopt, kEps), rms_norm(x, torch::ones({9}), kEps)));
}

TEST_F(Norm, GradientsMatchFiniteDifferences) {
  at::Tensor x = torch::randn({3, 5}, at::kDouble);
  at::Tensor gate = torch::randn({3, 5}, at::kDouble);
  at::Tensor weight = torch::randn({5}, at::kDouble);
  expect_gradients([](const auto& in) { return rms_norm(in[0], in[1], kEps); }, {x, weight},
                   "rms_norm");
  expect_gradients([](const auto& in) { return rms_norm_gated(in[0], in[1], in[2], kEps); },
                   {x, gate, weight}, "rms_norm_gated");
  expect_gradients([](const auto& in) { return l2_norm(in[0]); }, {x}, "l2_norm");
}

TEST_F(Norm, TakesFp32WeightsWithLowPrecisionInput) {
  const at::Tensor x = torch::randn({6, 32}).to(at::kBFloat16).requires_grad_();
  const at::Tensor weight = torch::randn({32}).requires_grad_();
  const at::Tensor y = rms_norm(x, weight, kEps);
  y.sum().backward();
  EXPECT_EQ(y.scalar_type(), at::kBFloat16);
  EXPECT_EQ(x.grad().scalar_type(), at::kBFloat16);
  EXPECT_EQ(weight.grad().scalar_type(), at::kFloat);
  EXPECT_FALSE(torch::equal(weight.grad(), weight.grad().to(at::kBFloat16).to(at::kFloat)))
      << "the sum over rows was rounded to bf16";
  const at::Tensor want =
      plain_rms_norm(x.detach().to(at::kDouble), weight.detach().to(at::kDouble));
  expect_close(y, want, {0, kHalfUlpBf16 * 1.01}, "y");  // rounded once, at the end
}

TEST_F(Norm, AutocastTakesAResidualOfAnotherDtype) {
  const at::Tensor x = torch::randn({2, 8}).to(at::kBFloat16).requires_grad_();
  const at::Tensor residual = torch::randn({2, 8}).requires_grad_();
  EXPECT_THROW(add_rms_norm(x, residual, std::nullopt, kEps), c10::ValueError);
  const AutocastBf16 autocast;
  const auto [y, sum] = add_rms_norm(x, residual, std::nullopt, kEps);
  EXPECT_TRUE(torch::equal(sum, x.to(at::kFloat) + residual));
  EXPECT_TRUE(torch::equal(y, rms_norm(sum, std::nullopt, kEps)));
  (y.sum() + sum.sum()).backward();
  EXPECT_EQ(x.grad().scalar_type(), at::kBFloat16);
  EXPECT_EQ(residual.grad().scalar_type(), at::kFloat);
}

TEST_F(Norm, EitherResultAloneHasAGradient) {
  const at::Tensor residual = torch::randn({3, 8});
  for (const bool normed : {true, false}) {
    const at::Tensor x = torch::randn({3, 8}).requires_grad_();
    const auto [y, sum] = add_rms_norm(x, residual, std::nullopt, kEps);
    (normed ? y : sum).pow(2).sum().backward();
    const at::Tensor plain = (x.detach() + residual).requires_grad_();
    (normed ? rms_norm(plain, std::nullopt, kEps) : plain).pow(2).sum().backward();
    EXPECT_TRUE(torch::equal(x.grad(), plain.grad())) << normed;
  }
}

TEST_F(Norm, AutocastTakesAGateOfAnotherDtype) {
  const at::Tensor x = torch::randn({2, 8}).to(at::kBFloat16);
  const at::Tensor gate = torch::randn({2, 8}).requires_grad_();
  EXPECT_THROW(rms_norm_gated(x, gate, std::nullopt, kEps), c10::ValueError);
  const AutocastBf16 autocast;
  const at::Tensor y = rms_norm_gated(x, gate, std::nullopt, kEps);
  EXPECT_TRUE(
      torch::equal(y, rms_norm_gated(x, gate.detach().to(at::kBFloat16), std::nullopt, kEps)));
  y.sum().backward();
  EXPECT_EQ(gate.grad().scalar_type(), at::kFloat);
}

TEST_F(Norm, AnyStridesGiveTheSameBits) {
  const at::Tensor weight = torch::randn({12});
  const at::Tensor wide = torch::randn({4, 3, 36});
  const at::Tensor slice = wide.narrow(2, 12, 12);                     // row stride 36
  const at::Tensor turned = torch::randn({3, 12, 4}).transpose(1, 2);  // last stride 4
  const at::Tensor expanded = torch::randn({1, 12}).expand({5, 12});
  for (const at::Tensor& x : {slice, slice.transpose(0, 1), turned, expanded}) {
    const at::Tensor gate = torch::randn_like(x);
    const auto op = [](const auto& in) { return rms_norm_gated(in[0], in[1], in[2], kEps); };
    expect_same_bits(op, {x, gate, weight}, {x.contiguous(), gate.contiguous(), weight});
    expect_same_bits(op, {x, x, weight}, {x.contiguous(), x.contiguous(), weight});
  }
}

TEST_F(Norm, ThreadsDoNotChangeBits) {
  const at::Tensor x = torch::randn({700, 100});
  const at::Tensor gate = torch::randn({700, 100});
  const at::Tensor weight = torch::randn({100});
  expect_threads_agree([](const auto& in) { return rms_norm_gated(in[0], in[1], in[2], kEps); },
                       {x, gate, weight});
}

TEST_F(Norm, EmptyTensorsWork) {
  for (const auto& sizes : {std::vector<int64_t>{0, 8}, {3, 0}, {0}}) {
    const at::Tensor x = torch::randn(sizes).requires_grad_();
    const at::Tensor weight = torch::randn({sizes.back()}).requires_grad_();
    const at::Tensor y = rms_norm(x, weight, kEps);
    EXPECT_EQ(y.sizes(), x.sizes());
    y.sum().backward();
    EXPECT_TRUE(torch::equal(weight.grad(), torch::zeros_like(weight)));
  }
}

TEST_F(Norm, NaNStaysInItsRow) {
  at::Tensor x = torch::randn({3, 20});
  x[1][17] = std::numeric_limits<float>::quiet_NaN();
  const at::Tensor y = rms_norm(x, std::nullopt, kEps);
  EXPECT_TRUE(y[1].isnan().all().item<bool>());
  EXPECT_FALSE(y[0].isnan().any().item<bool>());
  EXPECT_FALSE(y[2].isnan().any().item<bool>());
}

TEST_F(Norm, RejectsWhatItCannotTake) {
  const at::Tensor x = torch::randn({2, 8});
  expect_rejected([&] { rms_norm(x, torch::ones({7}), kEps); }, "rms_norm: weight", "[7]");
  expect_rejected([&] { rms_norm(x, torch::ones({8}, at::kDouble), kEps); }, "rms_norm: weight",
                  "Double");
  expect_rejected(
      [&] {
        rms_norm(torch::ones({2, 8}, at::kLong), std::nullopt, kEps);
      },
      "rms_norm: x", "Long");
  expect_rejected([&] { rms_norm_gated(x, x.narrow(1, 0, 4), std::nullopt, kEps); },
                  "rms_norm_gated: gate", "[2, 4]");
  expect_rejected([&] { add_rms_norm(x, x.narrow(1, 0, 4), std::nullopt, kEps); },
                  "add_rms_norm: residual", "[2, 4]");
  expect_rejected([&] { l2_norm(torch::tensor(1.0)); }, "l2_norm: x", "[]");
}

TEST_F(Norm, SecondDerivativesAreRefused) {
  const at::Tensor x = torch::randn({2, 8}).requires_grad_();
  const at::Tensor y = rms_norm(x, std::nullopt, kEps).sum();
  const at::Tensor d_x = torch::autograd::grad({y}, {x}, {}, true, /*create_graph=*/true)[0];
  EXPECT_ANY_THROW(d_x.sum().backward());
}

TEST_F(Norm, MetaKernelsKnowTheShapes) {
  expect_meta_agrees([](const auto& in) { return rms_norm_gated(in[0], in[1], in[2], kEps); },
                     {torch::randn({2, 3, 8}), torch::randn({2, 3, 8}), torch::randn({8})});
}

}  // namespace
}  // namespace gdn::test
