// linears as a torch operator.
#include <support/operators.h>
#include <support/tensor.h>

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <gdn/ops/common/linears.h>

namespace gdn::test {
namespace {

class Linears : public testing::Test {
 protected:
  void SetUp() override { torch::manual_seed(1); }

  static Tensors inputs(at::ScalarType dtype = at::kFloat) {
    return {torch::randn({2, 5, 12}, dtype), torch::randn({70, 12}, dtype),
            torch::randn({3, 12}, dtype), torch::randn({64, 12}, dtype),
            torch::randn({6, 12}, dtype)};
  }
};

/// The results side by side: one tensor, as the helpers expect.
at::Tensor all_of(const std::vector<at::Tensor>& results) { return at::cat(results, -1); }

at::Tensor fused(const Tensors& in) { return all_of(linears(in[0], at::TensorList(in).slice(1))); }

at::Tensor parts(const Tensors& in) {
  std::vector<at::Tensor> results;
  for (size_t i = 1; i < in.size(); ++i) results.push_back(at::linear(in[0], in[i]));
  return all_of(results);
}

TEST_F(Linears, MatchSeparateOnesInEveryDtype) {
  expect_matches_plain(fused, parts, inputs(at::kDouble), "linears");
}

TEST_F(Linears, GradientsMatchFiniteDifferences) {
  expect_gradients(fused,
                   {torch::randn({3, 4}, at::kDouble), torch::randn({65, 4}, at::kDouble),
                    torch::randn({2, 4}, at::kDouble), torch::randn({1, 4}, at::kDouble)},
                   "linears");
}

TEST_F(Linears, AResultThatIsNotUsedHasNoGradient) {
  Tensors in = inputs();
  for (at::Tensor& tensor : in) tensor.requires_grad_();
  linears(in[0], at::TensorList(in).slice(1))[0].sum().backward();
  EXPECT_TRUE(torch::allclose(in[0].grad(), in[1].detach().sum(0).expand({2, 5, 12}), 1e-5, 1e-5));
  EXPECT_EQ(in[2].grad().abs().max().item<float>(), 0);
}

TEST_F(Linears, FrozenWeightsGetNoGradient) {
  Tensors in = inputs();
  in[0].requires_grad_();
  in[3].requires_grad_();
  fused(in).sum().backward();
  EXPECT_TRUE(in[0].grad().defined());
  EXPECT_TRUE(torch::allclose(in[3].grad(), in[0].detach().flatten(0, 1).sum(0).expand({64, 12}),
                              1e-5, 1e-5));
  for (const size_t frozen : {1, 2, 4}) EXPECT_FALSE(in[frozen].grad().defined()) << frozen;
}

TEST_F(Linears, AutocastCastsEverything) {
  const Tensors in = inputs();
  Tensors low;
  for (const at::Tensor& tensor : in) low.push_back(tensor.to(at::kBFloat16));
  const AutocastBf16 autocast;
  const at::Tensor got = fused(in);
  EXPECT_EQ(got.scalar_type(), at::kBFloat16);
  EXPECT_TRUE(torch::equal(got, fused(low)));
}

TEST_F(Linears, RejectWhatDoesNotFit) {
  const at::Tensor x = torch::randn({2, 8});
  expect_rejected(
      [&] {
        linears(x, {torch::randn({3, 8}), torch::randn({3, 7})});
      },
      "linears: weights[1]", "[3, 7]");
  expect_rejected(
      [&] {
        linears(x, {torch::randn({3, 8}, at::kDouble)});
      },
      "linears: weights[0]", "Double");
}

TEST_F(Linears, MetaKernelsKnowTheShapes) { expect_meta_agrees(fused, inputs()); }

}  // namespace
}  // namespace gdn::test
