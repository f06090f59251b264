// Decoding on a GPU: its operators against those on the CPU, and generation from CUDA graphs.
#include <support/operators.h>
#include <support/tensor.h>
#include <vector>

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <gdn/models/decode_step.h>
#include <gdn/models/generate.h>
#include <gdn/ops/common/small_batch_linear.h>
#include <gdn/ops/gated_delta_rule/core.h>
#include <gdn/ops/gated_delta_rule/gated_delta_rule.h>

namespace gdn::test {
namespace {

/// `op` on the GPU, between tensors on the CPU.
template <typename Operator>
auto on_cuda(const Operator& op) {
  return [op](const Tensors& inputs) {
    Tensors moved;
    for (const at::Tensor& input : inputs) moved.push_back(input.to(at::kCUDA));
    return op(moved).to(at::kCPU);
  };
}

/// Forward alone, in every dtype of the kernels: at most twice as far from fp64 on the CPU as the
/// CPU in the same dtype (which rounds the products once more), and the output's rounding.
template <typename Operator>
void expect_cuda_matches(const Operator& op, const Tensors& inputs, const std::string& name) {
  const at::NoGradGuard no_grad;
  const auto as = [&](at::ScalarType dtype) {
    Tensors cast;
    for (const at::Tensor& input : inputs) cast.push_back(input.to(dtype));
    return cast;
  };
  for (const auto dtype : {at::kBFloat16, at::kHalf, at::kFloat}) {
    Tensors exact;
    for (const at::Tensor& input : as(dtype)) exact.push_back(input.to(at::kDouble));
    const at::Tensor truth = op(exact);
    const auto error = [&](const at::Tensor& y) {
      return (y.to(at::kDouble) - truth).norm().template item<double>();
    };
    const double rounding = dtype == at::kBFloat16 ? 0x1p-9
                            : dtype == at::kHalf   ? 0x1p-12
                                                   : 0x1p-22;
    const double got = error(on_cuda(op)(as(dtype))), plain = error(op(as(dtype)));
    EXPECT_LE(got, 2 * plain + rounding * truth.norm().template item<double>())
        << name << " " << dtype;
  }
}

class CudaDecode : public testing::Test {
 protected:
  void SetUp() override { torch::manual_seed(2); }
  static at::Tensor random(at::IntArrayRef sizes) { return torch::randn(sizes, at::kDouble); }
};

TEST_F(CudaDecode, LinearWithNormGateAndResidual) {
  for (const int64_t M : {1, 2, 5, 8, 9}) {  // 9: composed
    for (const auto& [N, D, G] : std::vector<std::tuple<int64_t, int64_t, int64_t>>{
             {40, 64, 64},
             {2048, 3072, 512},
             {9, 2048, 2048},
             {1000, 5632, 8},
             {5, 8, 8},
             {12, 20, 10}}) {  // the last: composed, of rows that are not aligned
      const at::Tensor x = random({M, D}), weight = random({N, D}) / std::sqrt(D);
      const std::string name =
          std::to_string(M) + " x " + std::to_string(D) + " -> " + std::to_string(N);
      expect_cuda_matches([](const auto& in) { return small_batch_linear(in[0], in[1]); },
                          {x, weight}, name);
      expect_cuda_matches(
          [](const auto& in) {
            return small_batch_linear(
                in[0], in[1],
                {.norm_weight = in[2], .eps = 1e-5, .gate = in[3], .residual = in[4]});
          },
          {x, weight, random({G}), random({M, D}), random({M, N})}, name + ", everything");
    }
  }
}

TEST_F(CudaDecode, LinearWithSwigluAndConvolution) {
  for (const int64_t M : {1, 3, 8, 11}) {
    const at::Tensor x = random({M, 256}), weight = random({100, 256}) / 16;
    expect_cuda_matches(
        [](const auto& in) { return small_batch_linear(in[0], in[1], {.swiglu = true}); },
        {x, weight}, "swiglu of " + std::to_string(M));
    for (const int64_t W : {2, 4, 5}) {  // 5: composed
      expect_cuda_matches(
          [](const auto& in) {
            at::Tensor state = in[3].clone();
            const at::Tensor y = small_batch_linear(
                in[0], in[1], {.conv_weight = in[2], .conv_bias = in[4], .conv_state = state});
            return at::cat({y.flatten(), state.flatten()});
          },
          {x, weight, random({60, W}), random({M, 60, W - 1}), random({60})},
          "convolution of " + std::to_string(M) + ", " + std::to_string(W) + " taps");
    }
  }
}

TEST_F(CudaDecode, LinearOfViews) {
  const at::Tensor wide = random({3, 800}), weight = random({30, 256}) / 16;
  expect_cuda_matches(
      [](const auto& in) {
        return small_batch_linear(in[0].narrow(1, 8, 256), in[1],
                                  {.norm_weight = in[2],
                                   .eps = 1e-5,
                                   .gate = in[0].narrow(1, 512, 256),
                                   .residual = in[0].narrow(1, 3, 30)});
      },
      {wide, weight, random({128})}, "views");
}

TEST_F(CudaDecode, ARowOfTheLinearDoesNotDependOnTheOthers) {
  const auto cuda = at::TensorOptions(at::kCUDA).dtype(at::kBFloat16);
  const at::Tensor x = torch::randn({8, 2048}, cuda), weight = torch::randn({64, 2048}, cuda);
  const at::Tensor all = small_batch_linear(x, weight);
  for (int64_t m = 0; m < 8; ++m) {
    EXPECT_TRUE(at::equal(small_batch_linear(x.narrow(0, m, 1), weight), all.narrow(0, m, 1)));
  }
}

TEST_F(CudaDecode, StepsAndStatesOfTheRule) {
  constexpr int64_t kB = 3, kT = 4, kH = 2, kHV = 4;
  for (const bool v_first : {false, true}) {
    for (const auto& [K, V] :
         std::vector<std::pair<int64_t, int64_t>>{{128, 128}, {256, 512}, {20, 37}}) {
      const Tensors inputs = {random({kB, kT, kH, K}), random({kB, kT, kH, K}),
                              random({kB, kT, kHV, V}), random({kB, kT, kHV}),
                              random({kB, kT, kHV})};
      const auto sizes =
          v_first ? std::vector<int64_t>{kB, kHV, V, K} : std::vector<int64_t>{kB, kHV, K, V};
      const at::Tensor state = random(sizes), A_log = random({kHV}), dt_bias = random({kHV});
      const auto wide = [](const at::Tensor& x, const at::Tensor& like) {  // states and gates
        return x.to(like.device(), like.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
      };
      const std::string name = std::to_string(K) + "/" + std::to_string(V);
      expect_cuda_matches(
          [&, v_first = v_first](const auto& in) {
            at::Tensor updated = wide(state, in[0]).clone();
            const at::Tensor o = gated_delta_rule_step(
                in[0], in[1], in[2], in[3], in[4], updated, wide(A_log, in[0]),
                wide(dt_bias, in[0]), /*allow_neg_eigval=*/true, std::nullopt, true, v_first,
                /*overlap=*/false);
            return at::cat({o.flatten().to(updated.scalar_type()), updated.flatten()});
          },
          inputs, "step " + name);
      expect_cuda_matches(
          [&, v_first = v_first](const auto& in) {
            const auto [o, states] =
                fused_recurrent_gated_delta_rule_states(in[0], in[1], in[2], in[3], in[4],
                                                        {.initial_state = wide(state, in[0]),
                                                         .use_qk_l2norm_in_kernel = true,
                                                         .use_beta_sigmoid_in_kernel = true,
                                                         .state_v_first = v_first,
                                                         .use_gate_in_kernel = true,
                                                         .A_log = wide(A_log, in[0]),
                                                         .dt_bias = wide(dt_bias, in[0])});
            return at::cat({o.flatten().to(states.scalar_type()), states.flatten()});
          },
          inputs, "states " + name);
    }
  }
}

using Tokens = std::vector<int64_t>;

GatedDeltaNetForCausalLM small_model(bool hybrid = false) {
  GatedDeltaNetConfig config;
  config.hidden_size = 128;
  config.head_dim = 32;
  config.num_heads = 2;
  config.num_v_heads = 4;
  config.num_hidden_layers = 3;
  config.vocab_size = 301;
  config.initializer_range = 0.2;
  if (hybrid) config.attn = {{.layers = {1}, .num_heads = 4, .window_size = 7}};
  torch::manual_seed(5);
  GatedDeltaNetForCausalLM model(config);
  model->eval();
  return model;
}

std::vector<Tokens> some_prompts(int64_t count) {
  std::vector<Tokens> prompts;
  for (int64_t i = 0; i < count; ++i) {
    const at::Tensor ids = torch::randint(301, {1 + 13 * (i % 4)}, at::kLong);
    prompts.emplace_back(ids.const_data_ptr<int64_t>(),
                         ids.const_data_ptr<int64_t>() + ids.numel());
  }
  return prompts;
}

TEST_F(CudaDecode, GeneratesWhatTheCpuGenerates) {
  for (const bool hybrid : {false, true}) {
    GatedDeltaNetForCausalLM model = small_model(hybrid);
    const auto prompts = some_prompts(10);
    for (const auto& options : {GenerateOptions{.max_new_tokens = 40, .temperature = 0},
                                GenerateOptions{.max_new_tokens = 40, .temperature = 0.8},
                                GenerateOptions{.max_new_tokens = 40, .top_k = 30, .top_p = 0.9}}) {
      model->to(at::kCPU);
      const auto expected = generate(model, prompts, options);
      model->to(at::kCUDA);
      EXPECT_EQ(generate(model, prompts, options), expected);
      EXPECT_EQ(generate(model, {prompts[0]}, options)[0], expected[0]);
    }
  }
}

TEST_F(CudaDecode, RowsLeaveTheGraph) {
  GatedDeltaNetForCausalLM model = small_model();
  model->to(at::kCUDA);
  const auto prompts = some_prompts(6);
  const GenerateOptions options{.max_new_tokens = 50, .top_k = 50, .seed = 3};
  const auto all = generate(model, prompts, options);
  std::vector<int64_t> counts(6, 0);
  const auto cut = generate(model, prompts, options, [&](int64_t row, int64_t) {
    return ++counts[row] < 4 * (row + 1);  // batches of 6, 3 and 1
  });
  for (int64_t row = 0; row < 6; ++row) {
    EXPECT_EQ(cut[row], Tokens(all[row].begin(), all[row].begin() + 4 * (row + 1))) << row;
  }
}

TEST_F(CudaDecode, NarrowStepsAreTheForward) {
  for (const auto dtype : {at::kBFloat16, at::kHalf}) {
    for (const int64_t B : {1, 4, 12}) {
      const torch::NoGradGuard no_grad;
      GatedDeltaNetForCausalLM model = small_model();
      const at::Tensor ids =
          torch::randint(301, {B, 20}, at::TensorOptions(at::kLong).device(at::kCUDA));
      model->to(at::kCUDA);
      const at::Tensor exact = model->forward({.input_ids = ids}).logits;
      model->to(dtype);
      const at::Tensor plain = model->forward({.input_ids = ids}).logits;
      Cache cache;
      model->forward({.input_ids = ids.narrow(1, 0, 10), .cache = &cache});
      DecodeStep step(model, std::move(cache));
      std::vector<at::Tensor> steps;
      for (int64_t t = 10; t < 20; ++t) steps.push_back(step.forward(ids.select(1, t)));
      const auto error = [&](const at::Tensor& logits) {
        return (logits - exact.narrow(1, 10, 10)).to(at::kDouble).norm().item<double>();
      };
      EXPECT_LE(error(at::stack(steps, 1)), 1.5 * error(plain.narrow(1, 10, 10))) << dtype << B;
    }
  }
}

TEST_F(CudaDecode, LogitsThatAreNotFiniteAreAnError) {
  GatedDeltaNetForCausalLM model = small_model();
  for (auto& named : model->named_parameters()) {
    if (named.key() == "model.norm.weight") named.value().data().fill_(NAN);
  }
  model->to(at::kCUDA);
  EXPECT_THROW(generate(model, {{1, 2}}, {.max_new_tokens = 3}), std::runtime_error);
}

}  // namespace
}  // namespace gdn::test
