// Modules against the same computation by torch's own functions.
#include <support/tensor.h>

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <gdn/modules/gated_mlp.h>
#include <gdn/modules/loss.h>
#include <gdn/modules/norm.h>
#include <gdn/modules/rotary.h>
#include <gdn/modules/short_convolution.h>

namespace gdn {
namespace {

/// fp32 sums of at most some hundred terms in another order.
constexpr double kTolerance = 64 * 1.2e-7;

void expect_close(const at::Tensor& got, const at::Tensor& expected) {
  EXPECT_EQ(got.scalar_type(), expected.scalar_type());
  test::expect_close_to_finite(got, expected, kTolerance);
}

TEST(RMSNorm, FusedAndPlainAgree) {
  torch::manual_seed(0);
  const at::Tensor x = torch::randn({3, 5, 12}), weight = torch::randn({12});
  const at::Tensor expected = x * (x.pow(2).mean(-1, true) + 1e-3).rsqrt() * weight;
  for (const bool fused : {true, false}) {
    RMSNorm norm(RMSNormOptions{.size = 12, .eps = 1e-3, .fused = fused});
    EXPECT_TRUE((norm->weight == 1).all().item<bool>());
    norm->weight.set_data(weight);
    expect_close(norm(x).detach(), expected);
    const at::Tensor narrow = norm(x.to(torch::kBFloat16));  // the weight may stay fp32
    EXPECT_EQ(narrow.scalar_type(), torch::kBFloat16);
  }
}

TEST(FusedRMSNormGated, MultipliesByTheGatesSilu) {
  torch::manual_seed(0);
  const at::Tensor x = torch::randn({3, 5, 12}), gate = torch::randn({3, 5, 12});
  FusedRMSNormGated norm(FusedRMSNormGatedOptions{.size = 12, .eps = 1e-5});
  norm->weight.set_data(torch::randn({12}));
  expect_close(
      norm(x, gate).detach(),
      (x * (x.pow(2).mean(-1, true) + 1e-5).rsqrt() * norm->weight * torch::silu(gate)).detach());
}

class Convolution : public ::testing::TestWithParam<bool> {
 protected:
  ShortConvolution make() const {
    torch::manual_seed(0);
    return ShortConvolution(
        ShortConvolutionOptions{.channels = 6, .kernel_size = 4, .bias = GetParam()});
  }
};

TEST_P(Convolution, EqualsTorchsGroupedConvolution) {
  ShortConvolution convolution = make();
  EXPECT_EQ(convolution->weight.sizes(), at::IntArrayRef({6, 1, 4}));
  EXPECT_LE(convolution->weight.abs().max().item<float>(), 0.5F);
  const at::Tensor x = torch::randn({2, 9, 6});
  const at::Tensor padded = torch::constant_pad_nd(x.transpose(1, 2), {3, 0});
  const at::Tensor expected =
      torch::silu(torch::conv1d(padded, convolution->weight, convolution->bias, at::IntArrayRef(1),
                                at::IntArrayRef(0), at::IntArrayRef(1), /*groups=*/6))
          .transpose(1, 2);
  expect_close(convolution(x).detach(), expected.detach());
}

TEST_P(Convolution, AnySplitAndPackingEqualTheWhole) {
  const torch::NoGradGuard no_grad;
  ShortConvolution convolution = make();
  const at::Tensor x = torch::randn({2, 9, 6});
  const at::Tensor whole = convolution(x);
  at::Tensor state;
  std::vector<at::Tensor> parts;
  for (const at::Tensor& part : x.split_with_sizes({2, 1, 1, 5}, 1)) {
    parts.push_back(convolution(part, std::nullopt, &state));
  }
  expect_close(torch::cat(parts, 1), whole);
  EXPECT_TRUE(torch::equal(state, x.narrow(1, 6, 3).transpose(1, 2)));

  const at::Tensor cu_seqlens = torch::tensor({0, 9, 18});
  at::Tensor packed_state;
  expect_close(convolution(x.view({1, 18, 6}), cu_seqlens, &packed_state).view({2, 9, 6}), whole);
  EXPECT_TRUE(torch::equal(packed_state, state));
}

INSTANTIATE_TEST_SUITE_P(Bias, Convolution, ::testing::Bool());

TEST(GatedMLP, FusedAndPlainAgree) {
  torch::manual_seed(0);
  const at::Tensor x = torch::randn({2, 3, 8});
  for (const bool fused : {true, false}) {
    GatedMLP mlp(GatedMLPOptions{.hidden_size = 8, .intermediate_size = 20, .fuse_swiglu = fused});
    const at::Tensor expected =
        torch::matmul(torch::silu(torch::matmul(x, mlp->gate_proj->weight.t())) *
                          torch::matmul(x, mlp->up_proj->weight.t()),
                      mlp->down_proj->weight.t());
    expect_close(mlp(x).detach(), expected.detach());
    EXPECT_EQ(mlp->named_parameters().size(), 3U);
  }
}

TEST(RotaryEmbedding, TurnsPairsByThePosition) {
  torch::manual_seed(0);
  const RotaryEmbedding rotary({.head_dim = 8, .base = 100.0});
  const at::Tensor x = torch::randn({2, 3, 4, 8});
  const at::Tensor positions = torch::tensor({{0, 5, 1'000'000}, {7, 8, 9}});
  const at::Tensor turned = RotaryEmbedding::rotate(x, rotary.angles(positions));
  for (int64_t b = 0; b < 2; ++b) {
    for (int64_t t = 0; t < 3; ++t) {
      for (int64_t i = 0; i < 4; ++i) {
        const double angle = positions[b][t].item<double>() * std::pow(100.0, -i / 4.0);
        const at::Tensor pair = torch::complex(x[b][t].select(1, i), x[b][t].select(1, i + 4));
        const at::Tensor expected = pair * c10::complex<double>(std::cos(angle), std::sin(angle));
        expect_close(turned[b][t].select(1, i), torch::real(expected).clone());
        expect_close(turned[b][t].select(1, i + 4), torch::imag(expected).clone());
      }
    }
  }
  EXPECT_THROW(RotaryEmbedding({.head_dim = 7}), c10::ValueError);
}

TEST(Loss, TargetsAreTheNextTokensOfTheSameSequence) {
  const at::Tensor labels = torch::tensor({{10, 11, 12, 13, 14, 15}});
  EXPECT_TRUE(
      torch::equal(next_token_targets(labels), torch::tensor({{11, 12, 13, 14, 15, -100}})));
  EXPECT_TRUE(torch::equal(next_token_targets(labels, torch::tensor({0, 0, 1, 4, 4, 6})),
                           torch::tensor({{-100, 12, 13, -100, 15, -100}})));
  EXPECT_EQ(next_token_targets(torch::empty({1, 0}, torch::kLong)).numel(), 0);
}

TEST(Loss, ThreeWaysAgree) {
  torch::manual_seed(0);
  const at::Tensor hidden = torch::randn({7, 8}), weight = torch::randn({11, 8});
  const at::Tensor targets = torch::tensor({3, -100, 0, 10, 5, -100, 1});
  const at::Tensor logits = torch::matmul(hidden, weight.t());
  const at::Tensor expected = token_cross_entropy(logits, targets, /*fused=*/false);
  expect_close(token_cross_entropy(logits, targets, /*fused=*/true), expected);
  expect_close(token_linear_cross_entropy(hidden, weight, targets), expected);
}

}  // namespace
}  // namespace gdn
