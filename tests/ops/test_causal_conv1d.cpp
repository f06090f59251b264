// causal_conv1d and causal_conv1d_update as torch operators.
#include <array>
#include <optional>
#include <support/operators.h>
#include <support/tensor.h>

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <gdn/ops/common/causal_conv1d.h>

namespace gdn::test {
namespace {

class CausalConv1d : public testing::Test {
 protected:
  void SetUp() override { torch::manual_seed(1); }
};

/// y and the final state, as one tensor [B, T + W - 1, D], of x, weight, bias, initial_state.
at::Tensor joined(const Tensors& in, Activation activation,
                  const std::optional<at::Tensor>& cu_seqlens = std::nullopt) {
  const auto [y, final_state] = causal_conv1d(in[0], in[1],
                                              {.bias = in[2],
                                               .activation = activation,
                                               .initial_state = in[3],
                                               .output_final_state = true,
                                               .cu_seqlens = cu_seqlens});
  if (cu_seqlens) return torch::cat({y.flatten(), final_state->flatten()});
  return torch::cat({y, final_state->transpose(1, 2)}, 1);
}

at::Tensor plain(const Tensors& in, Activation activation) {
  const int64_t T = in[0].size(1), D = in[0].size(2), W = in[1].size(1);
  const at::Tensor inputs = torch::cat({in[3].transpose(1, 2), in[0]}, 1);  // [B, W - 1 + T, D]
  const std::array<int64_t, 1> one = {1}, zero = {0};
  at::Tensor z = at::conv1d(inputs.transpose(1, 2), in[1].unsqueeze(1), in[2], one, zero, one, D)
                     .transpose(1, 2);
  if (activation == Activation::silu) z = torch::silu(z);
  return torch::cat({z, inputs.narrow(1, T, W - 1)}, 1);
}

Tensors random_inputs(int64_t B, int64_t T, int64_t D, int64_t W, int64_t N) {
  const at::TensorOptions fp64 = at::kDouble;
  return {torch::randn({B, T, D}, fp64), torch::randn({D, W}, fp64), torch::randn({D}, fp64),
          torch::randn({N, D, W - 1}, fp64)};
}

TEST_F(CausalConv1d, MatchesPlainTorchInEveryDtype) {
  for (const Activation activation : {Activation::none, Activation::silu}) {
    for (const int64_t T : {1, 3, 40}) {
      expect_matches_plain([&](const auto& in) { return joined(in, activation); },
                           [&](const auto& in) { return plain(in, activation); },
                           random_inputs(2, T, 20, 4, 2), "T " + std::to_string(T));
    }
  }
}

TEST_F(CausalConv1d, GradientsMatchFiniteDifferences) {
  expect_gradients([](const auto& in) { return joined(in, Activation::silu); },
                   random_inputs(2, 5, 2, 4, 2), "rows");
  const at::Tensor cu_seqlens = torch::tensor({0, 1, 1, 6}, at::kInt);
  expect_gradients([&](const auto& in) { return joined(in, Activation::silu, cu_seqlens); },
                   random_inputs(1, 6, 2, 3, 3), "packed");
}

TEST_F(CausalConv1d, OptionsMayBeAbsent) {
  const at::Tensor x = torch::randn({2, 9, 5});
  const at::Tensor weight = torch::randn({5, 3});
  const auto [y, final_state] = causal_conv1d(x, weight);
  EXPECT_FALSE(final_state.has_value());
  const Tensors zeros = {x, weight, torch::zeros({5}), torch::zeros({2, 5, 2})};
  EXPECT_TRUE(torch::equal(y, joined(zeros, Activation::none).narrow(1, 0, 9)));
}

TEST_F(CausalConv1d, PackedIsSeparate) {
  const std::vector<int64_t> boundaries = {0, 4, 4, 5, 70};
  const at::Tensor x = torch::randn({1, 70, 6});
  const at::Tensor weight = torch::randn({6, 4});
  const at::Tensor state = torch::randn({4, 6, 3});
  for (const at::ScalarType dtype : {at::kInt, at::kLong}) {
    const auto [y, final_state] = causal_conv1d(x, weight,
                                                {.initial_state = state,
                                                 .output_final_state = true,
                                                 .cu_seqlens = torch::tensor(boundaries, dtype)});
    for (int64_t n = 0; n < 4; ++n) {
      const auto [own, own_state] =
          causal_conv1d(x.narrow(1, boundaries[n], boundaries[n + 1] - boundaries[n]), weight,
                        {.initial_state = state.narrow(0, n, 1), .output_final_state = true});
      EXPECT_TRUE(torch::equal(own, y.slice(1, boundaries[n], boundaries[n + 1]))) << n;
      EXPECT_TRUE(torch::equal(*own_state, final_state->narrow(0, n, 1))) << n;
    }
  }
}

TEST_F(CausalConv1d, UpdateIsTheFullConvolution) {
  const at::Tensor x = torch::randn({3, 11, 7}).to(at::kBFloat16);
  const at::Tensor weight = torch::randn({7, 4});
  const at::Tensor bias = torch::randn({7});
  const auto [want, want_state] = causal_conv1d(
      x, weight, {.bias = bias, .activation = Activation::silu, .output_final_state = true});
  at::Tensor state = torch::zeros({3, 7, 3}, at::kBFloat16);
  at::Tensor turned = torch::zeros({3, 3, 7}, at::kBFloat16).transpose(1, 2);  // not contiguous
  for (at::Tensor* s : {&state, &turned}) {
    Tensors y;
    for (int64_t t = 0; t < 5; ++t) {
      y.push_back(causal_conv1d_update(x.select(1, t), *s, weight, bias, Activation::silu));
      ASSERT_EQ(y.back().dim(), 2);
    }
    at::Tensor result = torch::stack(y, 1);
    const at::Tensor rest =
        causal_conv1d_update(x.narrow(1, 5, 6), *s, weight, bias, Activation::silu);
    EXPECT_TRUE(torch::equal(torch::cat({result, rest}, 1), want));
    EXPECT_TRUE(torch::equal(*s, *want_state));
  }
}

TEST_F(CausalConv1d, AnyStridesGiveTheSameBits) {
  const Tensors in = random_inputs(2, 9, 6, 4, 2);
  Tensors low;
  for (const at::Tensor& tensor : in) low.push_back(tensor.to(at::kFloat));
  const at::Tensor wide = torch::randn({2, 9, 18});
  const at::Tensor weight = torch::randn({4, 6}).t();
  const at::Tensor state = torch::randn({2, 3, 6}).transpose(1, 2);
  const at::Tensor turned = torch::randn({2, 6, 9}).transpose(1, 2);  // last stride is not 1
  for (const at::Tensor& x : {wide.narrow(2, 6, 6), turned}) {
    expect_same_bits([](const auto& ins) { return joined(ins, Activation::silu); },
                     {x, weight, low[2], state},
                     {x.contiguous(), weight.contiguous(), low[2], state.contiguous()});
  }
}

TEST_F(CausalConv1d, ThreadsDoNotChangeBits) {
  Tensors in;
  for (const at::Tensor& tensor : random_inputs(2, 300, 70, 4, 2))
    in.push_back(tensor.to(at::kFloat));
  expect_threads_agree([](const auto& ins) { return joined(ins, Activation::silu); }, in);
}

TEST_F(CausalConv1d, EmptyTensorsWork) {
  const at::Tensor weight = torch::randn({5, 4});
  const at::Tensor state = torch::randn({2, 5, 3});
  const auto [y, final_state] = causal_conv1d(torch::empty({2, 0, 5}), weight,
                                              {.initial_state = state, .output_final_state = true});
  EXPECT_EQ(y.sizes(), at::IntArrayRef({2, 0, 5}));
  EXPECT_TRUE(torch::equal(*final_state, state));
  const at::Tensor trained = weight.clone().requires_grad_();
  std::get<0>(causal_conv1d(torch::empty({0, 3, 5}), trained)).sum().backward();
  EXPECT_TRUE(torch::equal(trained.grad(), torch::zeros({5, 4})));
}

TEST_F(CausalConv1d, RejectsWhatItCannotTake) {
  const at::Tensor x = torch::randn({2, 6, 5});
  const at::Tensor weight = torch::randn({5, 4});
  const auto call = [&](const CausalConv1dOptions& options) { causal_conv1d(x, weight, options); };
  expect_rejected([&] { causal_conv1d(x[0], weight); }, "causal_conv1d: x", "[B, T, D]");
  expect_rejected([&] { causal_conv1d(x, torch::randn({4, 4})); }, "weight", "[4, 4]");
  expect_rejected([&] { causal_conv1d(x, torch::randn({5, 9})); }, "weight", "2 <= W <= 8");
  expect_rejected([&] { causal_conv1d(x, weight.to(at::kBFloat16)); }, "weight", "BFloat16");
  expect_rejected([&] { call({.bias = torch::randn({4})}); }, "bias", "[4]");
  expect_rejected(
      [&] {
        call({.initial_state = torch::randn({2, 5, 4})});
      },
      "initial_state", "[N, D, W - 1]");
  expect_rejected(
      [&] {
        call({.cu_seqlens = torch::tensor({0, 6})});
      },
      "cu_seqlens", "batch size 2");
  const at::Tensor row = x.narrow(0, 0, 1);
  const auto packed = [&](const at::Tensor& cu_seqlens) {
    causal_conv1d(row, weight, {.cu_seqlens = cu_seqlens});
  };
  expect_rejected([&] { packed(torch::tensor({1, 6})); }, "cu_seqlens[0]", "1");
  expect_rejected([&] { packed(torch::tensor({0, 5})); }, "cu_seqlens[-1]", "5");
  expect_rejected([&] { packed(torch::tensor({0, 4, 2, 6})); }, "cu_seqlens", "4 then 2");
  expect_rejected([&] { packed(torch::tensor({0.0, 6.0})); }, "cu_seqlens", "Float");
  expect_rejected([&] { packed(torch::tensor({0})); }, "cu_seqlens", "[1]");
  at::Tensor state = torch::zeros({2, 5, 3}, at::kBFloat16);
  expect_rejected([&] { causal_conv1d_update(x, state, weight); }, "causal_conv1d_update: state",
                  "BFloat16");
  at::Tensor fp32_state = torch::zeros({2, 5, 3});
  const at::Tensor trained = weight.clone().requires_grad_();
  expect_rejected([&] { causal_conv1d_update(x, fp32_state, trained); }, "causal_conv1d_update",
                  "requires_grad");
}

TEST_F(CausalConv1d, MetaKernelsKnowTheShapes) {
  expect_meta_agrees([](const auto& in) { return joined(in, Activation::silu); },
                     random_inputs(2, 5, 3, 4, 2));
}

}  // namespace
}  // namespace gdn::test
