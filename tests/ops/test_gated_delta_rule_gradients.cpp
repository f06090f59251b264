// Gradients of the gated delta rule operators: finite differences in fp64, and autograd's edges.
#include <limits>
#include <map>
#include <string>
#include <support/gated_delta_rule_tensors.h>
#include <support/tensor.h>

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <gdn/ops/gated_delta_rule/core.h>
#include <gdn/ops/gated_delta_rule/gated_delta_rule.h>

namespace gdn::test {
namespace {

class GatedDeltaRuleGradients : public testing::TestWithParam<std::string> {
 protected:
  GatedDeltaRuleOp op() const {
    return GetParam() == "chunk" ? &chunk_gated_delta_rule : &fused_recurrent_gated_delta_rule;
  }
};
INSTANTIATE_TEST_SUITE_P(Forms, GatedDeltaRuleGradients, testing::Values("chunk", "recurrent"),
                         [](const auto& info) { return info.param; });

/// Compares the gradients of <o, w> + <final_state, w'> with finite differences, for every tensor.
void check_gradients(GatedDeltaRuleOp op, GatedDeltaRuleTensors x,
                     const GatedDeltaRuleOptions& options,
                     std::map<std::string, at::Tensor> parameters = {}) {
  const GatedDeltaRuleOutputs d = random_output_gradients(x);
  const auto loss = [&] {
    const GatedDeltaRuleOutputs y = call_op(op, x, options);
    return (y.o * d.o).sum() + (y.final_state * d.final_state).sum();
  };
  for (auto& [name, tensor] : x.by_name()) parameters[name] = *tensor;
  for (auto& [name, tensor] : parameters) tensor.requires_grad_();
  loss().backward();
  for (auto& [name, tensor] : parameters) {
    // Central differences with a step of 1e-5 err by about 1e-10 times the third derivative, and by
    // the rounding of a loss of about 10 over the step.
    expect_close(tensor.grad(), numerical_gradient(loss, tensor), {1e-8, 1e-8}, name);
  }
}

TEST_P(GatedDeltaRuleGradients, EqualFiniteDifferences) {
  const auto x =
      random_tensors({.B = 2, .T = 18, .H = 1, .HV = 2, .K = 3, .V = 2, .dtype = at::kDouble});
  GatedDeltaRuleOptions options;
  options.use_qk_l2norm_in_kernel = true;
  options.chunk_size = 16;
  check_gradients(op(), x, options);
}

TEST_P(GatedDeltaRuleGradients, EqualFiniteDifferencesOfEveryOption) {
  auto x = random_tensors(
      {.B = 1, .T = 18, .H = 1, .HV = 2, .K = 3, .V = 2, .dtype = at::kDouble, .N = 3});
  x.g = at::randn_like(x.g);
  x.beta = at::randn_like(x.beta);
  x.initial_state = x.initial_state.transpose(2, 3).contiguous();
  GatedDeltaRuleOptions options;
  options.scale = 0.7;
  options.use_beta_sigmoid_in_kernel = true;
  options.allow_neg_eigval = true;
  options.state_v_first = true;
  options.cu_seqlens = at::tensor({0, 1, 1, 18}, at::kLong);
  options.use_gate_in_kernel = true;
  options.A_log = at::randn({2}, at::kDouble);
  options.dt_bias = at::randn({2}, at::kDouble);
  options.chunk_size = 16;
  check_gradients(op(), x, options, {{"A_log", *options.A_log}, {"dt_bias", *options.dt_bias}});
}

TEST_P(GatedDeltaRuleGradients, OfOneOutputAlone) {
  const auto x = random_tensors({});
  const GatedDeltaRuleOutputs d = random_output_gradients(x);
  const auto function = [&](const GatedDeltaRuleTensors& y) { return call_op(op(), y); };
  const auto of_o = outputs_and_gradients(function, x, {d.o, at::zeros_like(d.final_state)});
  const auto of_state = outputs_and_gradients(function, x, {at::zeros_like(d.o), d.final_state});

  GatedDeltaRuleTensors y = x.to(at::kFloat);
  for (auto& [name, tensor] : y.by_name()) tensor->requires_grad_();
  const GatedDeltaRuleOutputs outputs = call_op(op(), y);
  torch::autograd::backward({outputs.o}, {d.o}, /*retain_graph=*/true);
  for (auto& [name, tensor] : y.by_name()) {
    EXPECT_TRUE(at::equal(tensor->grad(), of_o.at("d_" + name))) << name << " of o";
    tensor->mutable_grad().reset();
  }
  torch::autograd::backward({outputs.final_state}, {d.final_state});
  for (auto& [name, tensor] : y.by_name()) {
    EXPECT_TRUE(at::equal(tensor->grad(), of_state.at("d_" + name))) << name << " of final_state";
  }
}

TEST_P(GatedDeltaRuleGradients, OfOneInputAlone) {
  const auto x = random_tensors({});
  const auto all =
      outputs_and_gradients([&](const GatedDeltaRuleTensors& y) { return call_op(op(), y); }, x,
                            {at::ones_like(x.v), at::zeros_like(x.initial_state)});
  for (const std::string name : {"q", "k", "v", "g", "beta", "initial_state"}) {
    GatedDeltaRuleTensors y = x.to(at::kFloat);
    y.by_name().at(name)->requires_grad_();
    call_op(op(), y).o.sum().backward();
    for (auto& [other, tensor] : y.by_name()) {
      ASSERT_EQ(tensor->grad().defined(), other == name) << other;
    }
    EXPECT_TRUE(at::equal(y.by_name().at(name)->grad(), all.at("d_" + name))) << name;
  }
}

TEST_P(GatedDeltaRuleGradients, WithoutStates) {
  auto x = random_tensors({});
  auto [o, final_state] = op()(x.q.requires_grad_(), x.k, x.v, x.g, x.beta, {});
  EXPECT_FALSE(final_state.has_value());
  o.sum().backward();
  const at::Tensor without = x.q.grad().clone();
  x.q.mutable_grad().reset();
  x.initial_state.zero_();
  call_op(op(), x).o.sum().backward();
  EXPECT_TRUE(at::equal(x.q.grad(), without));
}

TEST_P(GatedDeltaRuleGradients, NothingIsRecordedWithoutNeed) {
  auto x = random_tensors({});
  EXPECT_FALSE(call_op(op(), x).o.requires_grad());
  x.q.requires_grad_();
  EXPECT_TRUE(call_op(op(), x).o.requires_grad());
  {
    const at::NoGradGuard no_grad;
    EXPECT_FALSE(call_op(op(), x).o.requires_grad());
  }
  const c10::InferenceMode inference;
  EXPECT_TRUE(call_op(op(), x).o.is_inference());
}

TEST_P(GatedDeltaRuleGradients, ASecondDerivativeIsRefused) {
  auto x = random_tensors({.dtype = at::kDouble});
  x.q.requires_grad_();
  const at::Tensor o = call_op(op(), x).o;
  const at::Tensor d_q = torch::autograd::grad({o}, {x.q}, {at::ones_like(o)}, true,
                                               /*create_graph=*/true)
                             .front();
  try {
    d_q.sum().backward();
    FAIL() << "a second derivative came back";
  } catch (const c10::Error& error) {
    EXPECT_NE(std::string(error.what()).find("gated_delta_rule_backward is not implemented"),
              std::string::npos)
        << error.what();
  }
}

// A change of a saved input between forward and backward is found, not computed with.
TEST_P(GatedDeltaRuleGradients, InputsChangedInBetweenAreFound) {
  auto x = random_tensors({});
  x.q.requires_grad_();
  const at::Tensor o = call_op(op(), x).o;
  x.k.add_(1);
  EXPECT_THROW(o.sum().backward(), c10::Error);
}

TEST(GatedDeltaRuleUpdate, RefusesGradients) {
  auto x = random_tensors({});
  x.q.requires_grad_();
  EXPECT_THROW(fused_recurrent_gated_delta_rule_update(x.q, x.k, x.v, x.g, x.beta, x.initial_state),
               c10::ValueError);
  const at::NoGradGuard no_grad;
  EXPECT_NO_THROW(
      fused_recurrent_gated_delta_rule_update(x.q, x.k, x.v, x.g, x.beta, x.initial_state));
}

TEST(GatedDeltaRuleUpdate, CountsAsAChangeOfTheState) {
  auto x = random_tensors({});
  const auto version = x.initial_state._version();
  fused_recurrent_gated_delta_rule_update(x.q, x.k, x.v, x.g, x.beta, x.initial_state);
  EXPECT_GT(x.initial_state._version(), version);
}

// The segment states that a training forward keeps are those that a backward without them computes.
TEST(GatedDeltaRuleCore, SegmentStatesAreOptionalForTheBackward) {
  const auto x = random_tensors({.B = 1, .T = 2100, .N = 3});
  const std::optional<at::Tensor> cu_seqlens = at::tensor({0, 1030, 1030, 2100}, at::kLong);
  const std::optional<at::Tensor> initial_state = x.initial_state;
  const auto [o, final_state, segments] = gated_delta_rule_forward(
      x.q, x.k, x.v, x.g, x.beta, initial_state, cu_seqlens, std::nullopt,
      /*use_qk_l2norm=*/false, /*state_v_first=*/false, /*chunk_size=*/64, /*recurrent=*/false,
      /*output_final_state=*/true, /*save_segment_states=*/true);
  // Room for (2100 + 3 * 1023) / 1024 = 5; the sequences have 2, 0 and 2 segments.
  ASSERT_EQ(segments.size(0), 5);
  EXPECT_TRUE(at::equal(segments[0], x.initial_state[0]));
  EXPECT_TRUE(at::equal(segments[2], x.initial_state[2]));
  EXPECT_TRUE(at::equal(segments[4], at::zeros_like(segments[4])));
  const auto backward = [&](const std::optional<at::Tensor>& states) {
    const auto [d_q, d_k, d_v, d_g, d_beta, d_initial_state] = gated_delta_rule_backward(
        at::ones_like(x.v), std::nullopt, x.q, x.k, x.v, x.g, x.beta, initial_state, cu_seqlens,
        states, std::nullopt, /*use_qk_l2norm=*/false, /*state_v_first=*/false, /*chunk_size=*/64);
    return std::vector<at::Tensor>{d_q, d_k, d_v, d_g, d_beta, d_initial_state};
  };
  const auto with = backward(segments);
  const auto without = backward(std::nullopt);
  for (size_t i = 0; i < with.size(); ++i) EXPECT_TRUE(at::equal(with[i], without[i])) << i;
}

}  // namespace
}  // namespace gdn::test
