// Every argument that the gated delta rule operators reject, which kernel they choose, autocast and
// meta tensors.
#include <functional>
#include <string>
#include <support/gated_delta_rule_tensors.h>
#include <vector>

#include <ATen/autocast_mode.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <gdn/ops/gated_delta_rule/core.h>
#include <gdn/ops/gated_delta_rule/dispatch.h>
#include <gdn/ops/gated_delta_rule/gated_delta_rule.h>

namespace gdn::test {
namespace {

/// One call: B 2, T 5, H 2, HV 4, K 8, V 6.
struct Call {
  GatedDeltaRuleTensors x = random_tensors({.T = 5});
  GatedDeltaRuleOptions options;
};

struct Mistake {
  std::string name;
  std::function<void(Call&)> make;
  std::string message;
};

void PrintTo(const Mistake& mistake, std::ostream* out) { *out << mistake.name; }

class GatedDeltaRuleErrors : public testing::TestWithParam<Mistake> {};

const std::vector<Mistake> kMistakes = {
    {"QDimensions", [](Call& c) { c.x.q = c.x.q[0]; },
     "q must be of shape [B, T, H, K] = [-1, -1, -1, -1], got Float [5, 2, 8] on cpu"},
    {"QHeads",
     [](Call& c) {
       c.x.q = c.x.k = at::zeros({2, 5, 0, 8});
     },
     "q must be of at least one head and one element, got Float [2, 5, 0, 8]"},
    {"QDType", [](Call& c) { c.x.q = c.x.q.to(at::kInt); },
     "q must be Float, BFloat16, Half or Double, got Int [2, 5, 2, 8]"},
    {"KShape",
     [](Call& c) {
       c.x.k = at::zeros({2, 4, 2, 8});
     },
     "k must be of shape [B, T, H, K] = [2, 5, 2, 8], got Float [2, 4, 2, 8]"},
    {"KDType", [](Call& c) { c.x.k = c.x.k.to(at::kHalf); },
     "k must be Float like q, got Half [2, 5, 2, 8]"},
    {"KDevice", [](Call& c) { c.x.k = c.x.k.to(at::kMeta); },
     "k must be on cpu like q, got Float [2, 5, 2, 8] on meta"},
    {"VShape",
     [](Call& c) {
       c.x.v = at::zeros({1, 5, 4, 6});
     },
     "v must be of shape [B, T, HV, V] = [2, 5, -1, -1], got Float [1, 5, 4, 6]"},
    {"VWidth",
     [](Call& c) {
       c.x.v = at::zeros({2, 5, 4, 0});
     },
     "v must be of at least one head and one element, got Float [2, 5, 4, 0]"},
    {"VDType", [](Call& c) { c.x.v = c.x.v.to(at::kDouble); },
     "v must be Float like q, got Double [2, 5, 4, 6]"},
    {"VDevice", [](Call& c) { c.x.v = c.x.v.to(at::kMeta); }, "v must be on cpu like q"},
    {"Heads",
     [](Call& c) {
       c.x.v = at::zeros({2, 5, 3, 6});
     },
     "v must be of a number of heads HV that is a multiple of q's H = 2, got HV = 3"},
    {"GShape",
     [](Call& c) {
       c.x.g = at::zeros({2, 5, 1});
     },
     "g must be of shape [B, T, HV] = [2, 5, 4], got Float [2, 5, 1]"},
    {"GDType", [](Call& c) { c.x.g = c.x.g.to(at::kLong); },
     "g must be Float, BFloat16, Half or Double, got Long [2, 5, 4]"},
    {"GDevice", [](Call& c) { c.x.g = c.x.g.to(at::kMeta); }, "g must be on cpu like q"},
    {"BetaShape",
     [](Call& c) {
       c.x.beta = at::zeros({2, 4, 5});
     },
     "beta must be of shape [B, T, HV] = [2, 5, 4], got Float [2, 4, 5]"},
    {"BetaDType", [](Call& c) { c.x.beta = c.x.beta.to(at::kBool); },
     "beta must be Float, BFloat16, Half or Double, got Bool [2, 5, 4]"},
    {"BetaDevice", [](Call& c) { c.x.beta = c.x.beta.to(at::kMeta); },
     "beta must be on cpu like q"},
    {"ChunkSize", [](Call& c) { c.options.chunk_size = 48; },
     "chunk_size must be 16, 32, 64 or 128, got 48"},
    {"StateShape",
     [](Call& c) {
       c.options.initial_state = c.x.initial_state;
       c.options.state_v_first = true;
     },
     "initial_state must be of shape [N, HV, V, K] = [2, 4, 6, 8], got Float [2, 4, 8, 6]"},
    {"StateDType", [](Call& c) { c.options.initial_state = c.x.initial_state.to(at::kBFloat16); },
     "initial_state must be Float (states are never stored in less), got BFloat16"},
    {"StateDevice", [](Call& c) { c.options.initial_state = c.x.initial_state.to(at::kMeta); },
     "initial_state must be on cpu like q"},
    {"BoundariesDType",
     [](Call& c) {
       c.options.cu_seqlens = at::tensor({0.0, 5.0});
     },
     "cu_seqlens must be"},
    {"BoundariesCount", [](Call& c) { c.options.cu_seqlens = at::tensor({0}, at::kLong); },
     "cu_seqlens must be"},
    {"BoundariesBatch",
     [](Call& c) {
       c.options.cu_seqlens = at::tensor({0, 5}, at::kLong);
     },
     "cu_seqlens must be absent unless the batch size is 1"},
    {"BoundariesDevice",
     [](Call& c) {
       c.x = random_tensors({.B = 1, .T = 5});
       c.options.cu_seqlens = at::tensor({0, 5}, at::kLong).to(at::kMeta);
     },
     "cu_seqlens must be on cpu like q"},
    {"BoundariesStart",
     [](Call& c) {
       c.x = random_tensors({.B = 1, .T = 5});
       c.options.cu_seqlens = at::tensor({1, 5}, at::kLong);
     },
     "cu_seqlens[0] must be 0, got 1"},
    {"BoundariesEnd",
     [](Call& c) {
       c.x = random_tensors({.B = 1, .T = 5});
       c.options.cu_seqlens = at::tensor({0, 6}, at::kInt);
     },
     "cu_seqlens[-1] must be the number of tokens 5, got 6"},
    {"BoundariesOrder",
     [](Call& c) {
       c.x = random_tensors({.B = 1, .T = 5});
       c.options.cu_seqlens = at::tensor({0, 4, 3, 5}, at::kLong);
     },
     "cu_seqlens must be non-decreasing"},
    {"NegativeEigenvalues", [](Call& c) { c.options.allow_neg_eigval = true; },
     "allow_neg_eigval must be false without use_beta_sigmoid_in_kernel, got true"},
    {"MissingA", [](Call& c) { c.options.use_gate_in_kernel = true; },
     "A_log must be given with use_gate_in_kernel, got no tensor"},
    {"UnusedA", [](Call& c) { c.options.A_log = at::zeros({4}); },
     "A_log must be absent without use_gate_in_kernel, got Float [4]"},
    {"UnusedBias", [](Call& c) { c.options.dt_bias = at::zeros({4}); },
     "dt_bias must be absent without use_gate_in_kernel, got Float [4]"},
    {"AShape",
     [](Call& c) {
       c.options.use_gate_in_kernel = true;
       c.options.A_log = at::zeros({2});
     },
     "A_log must be of shape [HV] = [4], got Float [2]"},
    {"BiasShape",
     [](Call& c) {
       c.options.use_gate_in_kernel = true;
       c.options.A_log = at::zeros({4});
       c.options.dt_bias = at::zeros({1});
     },
     "dt_bias must be of shape [HV] = [4], got Float [1]"},
};
INSTANTIATE_TEST_SUITE_P(, GatedDeltaRuleErrors, testing::ValuesIn(kMistakes),
                         [](const auto& info) { return info.param.name; });

template <typename Function>
std::string rejection(const Function& function) {
  try {
    function();
  } catch (const c10::ValueError& error) {
    return error.what_without_backtrace();
  }
  return "nothing was rejected";
}

void expect_contains(const std::string& text, const std::string& part) {
  EXPECT_NE(text.find(part), std::string::npos) << "got: " << text << "\nexpected: " << part;
}

TEST_P(GatedDeltaRuleErrors, NameTheArgument) {
  Call call;
  GetParam().make(call);
  const auto& [x, options] = call;
  expect_contains(rejection([&] { chunk_gated_delta_rule(x.q, x.k, x.v, x.g, x.beta, options); }),
                  GetParam().message);
  expect_contains(
      rejection([&] { fused_recurrent_gated_delta_rule(x.q, x.k, x.v, x.g, x.beta, options); }),
      GetParam().message);
}

std::string update_rejection(const at::Tensor& state, const GatedDeltaRuleOptions& options) {
  const GatedDeltaRuleTensors x = random_tensors({.T = 5});
  at::Tensor cache = state;
  return rejection(
      [&] { fused_recurrent_gated_delta_rule_update(x.q, x.k, x.v, x.g, x.beta, cache, options); });
}

TEST(GatedDeltaRuleUpdateErrors, NameTheArgument) {
  const at::Tensor state = at::zeros({2, 4, 8, 6});
  GatedDeltaRuleOptions options;
  expect_contains(update_rejection(at::zeros({2, 4, 6, 8}), options),
                  "state must be of shape [N, HV, K, V] = [2, 4, 8, 6], got Float [2, 4, 6, 8]");
  expect_contains(update_rejection(state.to(at::kHalf), options),
                  "state must be Float or BFloat16");
  options.allow_neg_eigval = true;
  expect_contains(update_rejection(state, options), "allow_neg_eigval must be false");
  options = {};
  options.output_final_state = true;
  expect_contains(update_rejection(state, options),
                  "output_final_state must be false: state becomes the final state, got true");
  options = {};
  options.initial_state = state;
  expect_contains(update_rejection(state, options),
                  "initial_state must be absent: state is the initial state");
}

// Called directly, as Python can, the core operators check what the public ones have prepared.
TEST(GatedDeltaRuleCoreErrors, NameTheArgument) {
  const GatedDeltaRuleTensors x = random_tensors({.T = 5});
  const auto forward = [&](const at::Tensor& g, const at::Tensor& beta, bool recurrent, bool save) {
    return rejection([&] {
      gated_delta_rule_forward(x.q, x.k, x.v, g, beta, std::nullopt, std::nullopt, std::nullopt,
                               false, false, 64, recurrent, false, save);
    });
  };
  const at::Tensor wide = x.g.to(at::kDouble);
  expect_contains(forward(wide, x.beta, false, false), "g must be Float, got Double [2, 5, 4]");
  expect_contains(forward(x.g, wide, false, false), "beta must be Float, got Double [2, 5, 4]");
  expect_contains(forward(x.g, x.beta, true, true),
                  "save_segment_states must be false for the recurrent form, got true");
  const auto backward = [&](const at::Tensor& d_o, const std::optional<at::Tensor>& d_state,
                            const std::optional<at::Tensor>& segments) {
    return rejection([&] {
      gated_delta_rule_backward(d_o, d_state, x.q, x.k, x.v, x.g, x.beta, std::nullopt,
                                std::nullopt, segments, std::nullopt, false, false, 64);
    });
  };
  expect_contains(backward(x.q, std::nullopt, std::nullopt),
                  "d_o must be of shape [B, T, HV, V] = [2, 5, 4, 6], got Float [2, 5, 2, 8]");
  expect_contains(backward(x.v, x.q, std::nullopt), "d_final_state must be of shape");
  expect_contains(backward(x.v, std::nullopt, at::zeros({1, 4, 8, 6})),
                  "segment_states must be of shape [segments, HV, K, V] = [2, 4, 8, 6]");
}

TEST(GatedDeltaRuleDispatch, Fp64IsServedByTheReferenceAndTheRestBySimd) {
  for (const auto pass : {GatedDeltaRulePass::chunk_forward, GatedDeltaRulePass::recurrent_forward,
                          GatedDeltaRulePass::backward}) {
    const bool backward = pass == GatedDeltaRulePass::backward;
    for (const auto dtype : {at::kFloat, at::kBFloat16, at::kHalf, at::kDouble}) {
      const KernelChoice choice = choose_kernel(pass, dtype);
      EXPECT_EQ(choice.name.rfind(dtype == at::kDouble ? "reference::" : "cpu::", 0), 0U)
          << choice.name;
      EXPECT_FALSE(choice.reason.empty());
      EXPECT_EQ(choice.forward == nullptr, backward);
      EXPECT_EQ(choice.backward == nullptr, !backward);
    }
  }
}

TEST(GatedDeltaRuleAutocast, CastsQueriesKeysAndValues) {
  const auto x = random_tensors({});
  const auto bf16 = x.to(at::kBFloat16);
  const auto expected = call_op(chunk_gated_delta_rule, bf16);
  at::autocast::set_autocast_enabled(at::kCPU, true);
  const auto from_fp32 = call_op(chunk_gated_delta_rule, x);
  GatedDeltaRuleTensors mixed = x;
  mixed.v = bf16.v;
  const auto from_mixed = call_op(fused_recurrent_gated_delta_rule, mixed);
  at::Tensor state = x.initial_state.clone();
  const at::Tensor updated = fused_recurrent_gated_delta_rule_update(mixed.q, mixed.k, mixed.v,
                                                                     mixed.g, mixed.beta, state);
  at::autocast::clear_cache();
  at::autocast::set_autocast_enabled(at::kCPU, false);
  EXPECT_TRUE(at::equal(from_fp32.o, expected.o));
  EXPECT_TRUE(at::equal(from_fp32.final_state, expected.final_state));
  EXPECT_EQ(from_fp32.final_state.scalar_type(), at::kFloat);
  EXPECT_EQ(from_mixed.o.scalar_type(), at::kBFloat16);
  EXPECT_TRUE(at::equal(from_mixed.o, updated));
  EXPECT_TRUE(at::equal(from_mixed.final_state, state));
}

TEST(GatedDeltaRuleAutocast, GradientsComeInTheDTypesOfTheInputs) {
  auto x = random_tensors({});
  for (auto& [name, tensor] : x.by_name()) tensor->requires_grad_();
  at::autocast::set_autocast_enabled(at::kCPU, true);
  const auto y = call_op(chunk_gated_delta_rule, x);
  at::autocast::clear_cache();
  at::autocast::set_autocast_enabled(at::kCPU, false);
  y.o.sum().backward();
  for (auto& [name, tensor] : x.by_name()) {
    EXPECT_EQ(tensor->grad().scalar_type(), at::kFloat) << name;
  }
}

// On meta tensors an operator gives the shapes, dtypes and strides of the real run.
TEST(GatedDeltaRuleMeta, DescribesTheRealRun) {
  for (const auto dtype : {at::kFloat, at::kBFloat16, at::kDouble}) {
    for (const bool packed : {false, true}) {
      const auto x = random_tensors({.B = packed ? 1 : 2, .T = 9, .dtype = dtype, .N = 2});
      GatedDeltaRuleTensors meta = x;
      for (auto& [name, tensor] : meta.by_name()) *tensor = tensor->to(at::kMeta);
      GatedDeltaRuleOptions options;
      if (packed) options.cu_seqlens = at::tensor({0, 4, 9}, at::kLong);
      const auto same = [](const at::Tensor& got, const at::Tensor& want) {
        EXPECT_TRUE(got.is_meta());
        EXPECT_EQ(got.sizes(), want.sizes());
        EXPECT_EQ(got.strides(), want.strides());
        EXPECT_EQ(got.scalar_type(), want.scalar_type());
      };
      for (const GatedDeltaRuleOp op :
           {&chunk_gated_delta_rule, &fused_recurrent_gated_delta_rule}) {
        const auto run = [&](GatedDeltaRuleTensors y) {
          for (auto& [name, tensor] : y.by_name()) *tensor = tensor->detach().requires_grad_();
          const auto outputs = call_op(op, y, options);
          (outputs.o.sum() + outputs.final_state.sum()).backward();
          std::vector<at::Tensor> results = {outputs.o, outputs.final_state};
          for (auto& [name, tensor] : y.by_name()) results.push_back(tensor->grad());
          return results;
        };
        const auto got = run(meta);
        const auto want = run(x);
        for (size_t i = 0; i < want.size(); ++i) same(got[i], want[i]);
      }
      same(fused_recurrent_gated_delta_rule_update(meta.q, meta.k, meta.v, meta.g, meta.beta,
                                                   meta.initial_state, options),
           x.v);
    }
  }
}

}  // namespace
}  // namespace gdn::test
