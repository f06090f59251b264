// swiglu and gated_delta_rule_gate as torch operators.
#include <support/operators.h>
#include <support/tensor.h>

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <gdn/ops/common/swiglu.h>
#include <gdn/ops/gated_delta_rule/gated_delta_rule.h>

namespace gdn::test {
namespace {

class Swiglu : public testing::Test {
 protected:
  void SetUp() override { torch::manual_seed(1); }
};
using Gate = Swiglu;

const auto kSwiglu = [](const Tensors& in) { return swiglu(in[0], in[1]); };
const auto kGate = [](const Tensors& in) { return gated_delta_rule_gate(in[0], in[1], in[2]); };

TEST_F(Swiglu, MatchesPlainTorchInEveryDtype) {
  expect_matches_plain(
      kSwiglu, [](const Tensors& in) { return torch::silu(in[0]) * in[1]; },
      {torch::randn({3, 4, 50}, at::kDouble), torch::randn({3, 4, 50}, at::kDouble)}, "swiglu");
}

TEST_F(Swiglu, GradientsMatchFiniteDifferences) {
  expect_gradients(kSwiglu, {torch::randn({2, 7}, at::kDouble), torch::randn({2, 7}, at::kDouble)},
                   "swiglu");
}

TEST_F(Swiglu, AnyStridesGiveTheSameBits) {
  const at::Tensor both = torch::randn({5, 24});
  const Tensors halves = {both.narrow(1, 0, 12), both.narrow(1, 12, 12)};
  const Tensors turned = {torch::randn({12, 5}).t(), torch::randn({5, 1}).expand({5, 12})};
  const Tensors half_and_whole = {halves[0], torch::randn({5, 12})};  // rows 24 and 12 apart
  for (const Tensors& in : {halves, turned, half_and_whole}) {
    expect_same_bits(kSwiglu, in, {in[0].contiguous(), in[1].contiguous()});
  }
}

TEST_F(Swiglu, EmptyTensorsWork) {
  const at::Tensor gate = torch::empty({3, 0}).requires_grad_();
  swiglu(gate, torch::empty({3, 0})).sum().backward();
  EXPECT_EQ(gate.grad().sizes(), gate.sizes());
}

TEST_F(Swiglu, AutocastPromotes) {
  const at::Tensor gate = torch::randn({2, 8}).to(at::kBFloat16);
  const at::Tensor up = torch::randn({2, 8});
  const AutocastBf16 autocast;
  EXPECT_TRUE(torch::equal(swiglu(gate, up), swiglu(gate.to(at::kFloat), up)));
}

TEST_F(Swiglu, RejectsWhatItCannotTake) {
  const at::Tensor gate = torch::randn({2, 8});
  expect_rejected([&] { swiglu(gate, gate.narrow(1, 0, 4)); }, "swiglu: up", "[2, 4]");
  expect_rejected([&] { swiglu(gate, gate.to(at::kHalf)); }, "swiglu: up", "Half");
  expect_rejected([&] { swiglu(gate.to(at::kInt), gate); }, "swiglu: gate", "Int");
}

TEST_F(Swiglu, MetaKernelsKnowTheShapes) {
  expect_meta_agrees(kSwiglu, {torch::randn({2, 8}), torch::randn({2, 8})});
}

TEST_F(Swiglu, LinearEqualsItsPartsInEveryBit) {
  const Tensors in = {torch::randn({3, 4, 10}), torch::randn({3, 4, 10}), torch::randn({6, 10})};
  const auto fused = [](const Tensors& t) { return swiglu_linear(t[0], t[1], t[2]); };
  const auto parts = [](const Tensors& t) { return at::linear(swiglu(t[0], t[1]), t[2]); };
  const Tensors got = output_and_gradients(fused, in), want = output_and_gradients(parts, in);
  for (size_t i = 0; i < want.size(); ++i) EXPECT_TRUE(torch::equal(got[i], want[i])) << i;
  expect_meta_agrees(fused, in);
  const AutocastBf16 autocast;
  EXPECT_TRUE(torch::equal(
      fused(in), at::linear(swiglu(in[0].to(at::kBFloat16), in[1].to(at::kBFloat16)), in[2])));
}

TEST_F(Swiglu, LinearGradientsMatchFiniteDifferences) {
  expect_gradients([](const Tensors& t) { return swiglu_linear(t[0], t[1], t[2]); },
                   {torch::randn({2, 5}, at::kDouble), torch::randn({2, 5}, at::kDouble),
                    torch::randn({3, 5}, at::kDouble)},
                   "swiglu_linear");
}

TEST_F(Swiglu, LinearRejectsAWeightThatDoesNotFit) {
  const at::Tensor gate = torch::randn({2, 8});
  expect_rejected(
      [&] {
        swiglu_linear(gate, gate, torch::randn({3, 7}));
      },
      "swiglu_linear: weight", "[3, 7]");
}

TEST_F(Gate, MatchesPlainTorchInFp32) {
  const Tensors in = {torch::randn({2, 30, 6}), torch::randn({6}), torch::randn({6})};
  Tensors exact;
  for (const at::Tensor& tensor : in) exact.push_back(tensor.to(at::kDouble));
  const auto plain = [](const Tensors& t) { return -t[1].exp() * at::softplus(t[0] + t[2]); };
  const Tensors got = output_and_gradients(kGate, in);
  const Tensors same_dtype = output_and_gradients(plain, in);
  const Tensors want = output_and_gradients(plain, exact);
  for (size_t i = 0; i < want.size(); ++i) {
    const double plain_error = largest(same_dtype[i].to(at::kDouble) - want[i]);
    expect_close(got[i], want[i], 2 * plain_error + kFp32Roundings * largest(want[i]),
                 "result " + std::to_string(i));
  }
}

TEST_F(Gate, GradientsMatchFiniteDifferences) {
  expect_gradients(kGate,
                   {torch::randn({2, 3, 4}, at::kDouble), torch::randn({4}, at::kDouble),
                    torch::randn({4}, at::kDouble)},
                   "gate");
}

TEST_F(Gate, TakesLowPrecisionAndStaysInFp32) {
  const at::Tensor a = torch::randn({5, 3}).to(at::kBFloat16).requires_grad_();
  const at::Tensor A_log = torch::randn({3});
  const at::Tensor dt_bias = torch::randn({3});
  const at::Tensor g = gated_delta_rule_gate(a, A_log, dt_bias);
  EXPECT_EQ(g.scalar_type(), at::kFloat);
  EXPECT_TRUE(torch::equal(g, gated_delta_rule_gate(a.detach().to(at::kFloat), A_log, dt_bias)));
  g.sum().backward();
  EXPECT_EQ(a.grad().scalar_type(), at::kBFloat16);
}

TEST_F(Gate, AnyStridesThreadsAndEmptyTensors) {
  const at::Tensor parameters = torch::randn({2, 5});
  const at::Tensor a = torch::randn({4, 15}).narrow(1, 5, 5);
  expect_same_bits(kGate, {a, parameters[0], parameters[1]},
                   {a.contiguous(), parameters[0], parameters[1]});
  expect_threads_agree(kGate, {torch::randn({9000, 5}), parameters[0], parameters[1]});
  const at::Tensor A_log = parameters[0].clone().requires_grad_();
  gated_delta_rule_gate(torch::empty({0, 5}), A_log, parameters[1]).sum().backward();
  EXPECT_TRUE(torch::equal(A_log.grad(), torch::zeros({5})));
}

TEST_F(Gate, RejectsWhatItCannotTake) {
  const at::Tensor a = torch::randn({2, 8});
  expect_rejected([&] { gated_delta_rule_gate(a, torch::randn({7}), torch::randn({8})); }, "A_log",
                  "[7]");
  expect_rejected(
      [&] {
        gated_delta_rule_gate(a, torch::randn({8}), torch::randn({8, 1}));
      },
      "dt_bias", "[8, 1]");
}

TEST_F(Gate, MetaKernelsKnowTheShapes) {
  expect_meta_agrees(kGate, {torch::randn({2, 8}), torch::randn({8}), torch::randn({8})});
}

}  // namespace
}  // namespace gdn::test
