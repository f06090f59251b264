// What decoding adds to the recurrent form: the state after every token, and the gates on the way.
#include <support/operators.h>
#include <support/tensor.h>

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <gdn/ops/gated_delta_rule/core.h>
#include <gdn/ops/gated_delta_rule/gated_delta_rule.h>

namespace gdn::test {
namespace {

constexpr int64_t kB = 2, kT = 5, kH = 2, kHV = 4, kK = 8, kV = 12;

class GatedDeltaRuleSteps : public testing::TestWithParam<std::tuple<at::ScalarType, bool>> {
 protected:
  static at::ScalarType seeded(at::ScalarType dtype) {  // before the first random member
    torch::manual_seed(3);
    return dtype;
  }
  at::Tensor random(at::IntArrayRef sizes) const { return torch::randn(sizes).to(dtype_); }
  at::Tensor random_state() const {
    const auto dtype = dtype_ == at::kDouble ? at::kDouble : at::kFloat;
    return v_first_ ? torch::randn({kB, kHV, kV, kK}, dtype)
                    : torch::randn({kB, kHV, kK, kV}, dtype);
  }
  GatedDeltaRuleOptions options() const {
    return {.use_qk_l2norm_in_kernel = true,
            .use_beta_sigmoid_in_kernel = true,
            .allow_neg_eigval = true,
            .state_v_first = v_first_,
            .use_gate_in_kernel = true,
            .A_log = A_log_,
            .dt_bias = dt_bias_};
  }

  const at::ScalarType dtype_ = seeded(std::get<0>(GetParam()));
  const bool v_first_ = std::get<1>(GetParam());
  const at::Tensor q_ = random({kB, kT, kH, kK}), k_ = random({kB, kT, kH, kK});
  const at::Tensor v_ = random({kB, kT, kHV, kV});
  const at::Tensor a_ = random({kB, kT, kHV}), b_ = random({kB, kT, kHV});
  const at::Tensor A_log_ = torch::rand({kHV}, dtype_ == at::kDouble ? at::kDouble : at::kFloat);
  const at::Tensor dt_bias_ = torch::randn_like(A_log_);
};

TEST_P(GatedDeltaRuleSteps, StatesAreThoseOfSingleSteps) {
  // Gates that are given: computed on the way, they may be rounded otherwise in another batch.
  const GatedDeltaRuleOptions plain{.use_qk_l2norm_in_kernel = true, .state_v_first = v_first_};
  const at::Tensor g = -a_.abs(), beta = b_.sigmoid(), initial = random_state();
  for (const bool given : {true, false}) {
    GatedDeltaRuleOptions with_state = plain;
    if (given) with_state.initial_state = initial;
    const auto [o, states] =
        fused_recurrent_gated_delta_rule_states(q_, k_, v_, g, beta, with_state);
    at::Tensor state = given ? initial.clone() : at::zeros_like(initial);
    for (int64_t t = 0; t < kT; ++t) {
      const auto token = [t](const at::Tensor& x) { return x.narrow(1, t, 1); };
      const at::Tensor one = fused_recurrent_gated_delta_rule_update(
          token(q_), token(k_), token(v_), token(g), token(beta), state, plain);
      EXPECT_TRUE(at::equal(token(o), one)) << t;
      EXPECT_TRUE(at::equal(states.select(1, t), state)) << t;
    }
  }
}

TEST_P(GatedDeltaRuleSteps, ARolledBackRunGoesOnAsIfNothingHadBeenDrafted) {
  const auto [drafted, states] =
      fused_recurrent_gated_delta_rule_states(q_, k_, v_, a_, b_, options());
  constexpr int64_t kAccepted = 2, kRest = kT - kAccepted;
  at::Tensor state = states.select(1, kAccepted - 1).contiguous();
  const auto rest = [](const at::Tensor& x) { return x.narrow(1, kAccepted, kRest); };
  const at::Tensor o = fused_recurrent_gated_delta_rule_update(
      rest(q_), rest(k_), rest(v_), rest(a_), rest(b_), state, options());
  EXPECT_TRUE(at::allclose(o, rest(drafted)));
  EXPECT_TRUE(at::allclose(state, states.select(1, kT - 1)));
}

TEST_P(GatedDeltaRuleSteps, GatesOnTheWayAreThoseOfTheOperator) {
  at::Tensor state = random_state();
  at::Tensor expected_state = state.clone();
  const at::Tensor o = gated_delta_rule_step(q_, k_, v_, a_, b_, state, A_log_, dt_bias_,
                                             /*allow_neg_eigval=*/true, std::nullopt,
                                             /*use_qk_l2norm=*/true, v_first_, /*overlap=*/true);
  const at::Tensor expected =
      fused_recurrent_gated_delta_rule_update(q_, k_, v_, a_, b_, expected_state, options());
  EXPECT_TRUE(at::equal(o, expected));
  EXPECT_TRUE(at::equal(state, expected_state));
}

INSTANTIATE_TEST_SUITE_P(Cpu, GatedDeltaRuleSteps,
                         testing::Combine(testing::Values(at::kFloat, at::kBFloat16, at::kDouble),
                                          testing::Bool()));

TEST(GatedDeltaRuleStepErrors, NameTheArgument) {
  const at::Tensor q = torch::randn({1, 2, 1, 4}), v = torch::randn({1, 2, 2, 4});
  const at::Tensor g = torch::randn({1, 2, 2}), state = torch::randn({1, 2, 4, 4});
  const auto states = [&](const GatedDeltaRuleOptions& options) {
    return [&, options] { fused_recurrent_gated_delta_rule_states(q, q, v, g, g, options); };
  };
  expect_rejected(states({.output_final_state = true}), "output_final_state", "false");
  expect_rejected(states({.cu_seqlens = torch::tensor({0, 2}, at::kLong)}), "cu_seqlens", "absent");
  expect_rejected(states({.initial_state = g}), "initial_state", "[N, HV, K, V]");
  at::Tensor kept = state;
  const auto step = [&](const at::Tensor& a, const at::Tensor& A_log) {
    return [&, a, A_log] {
      gated_delta_rule_step(q, q, v, a, g, kept, A_log, torch::ones({2}), false, std::nullopt,
                            /*use_qk_l2norm=*/true, /*state_v_first=*/false, /*overlap=*/false);
    };
  };
  expect_rejected(step(g, torch::ones({3})), "A_log", "[HV] = [2]");
  expect_rejected(step(g, torch::ones({2}, at::kBFloat16)), "A_log", "Float");
  expect_rejected(step(g.to(at::kBFloat16), torch::ones({2})), "gated_delta_rule_step: a", "Float");
}

}  // namespace
}  // namespace gdn::test
