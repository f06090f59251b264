// The token mixers alone: shapes, options, parameters, errors.
#include <gdn/layers/attention.h>
#include <gdn/layers/gated_deltanet.h>
#include <gdn/layers/packing.h>

#include "models/plain_model.h"
#include "models/tiny_models.h"

namespace gdn::testing {
namespace {

GatedDeltaNetOptions tiny_options() {
  return {.hidden_size = 24, .expand_v = 1.5, .head_dim = 8, .num_heads = 2, .num_v_heads = 4};
}

/// Name and shape of every parameter, in order.
std::vector<std::string> describe_parameters(const torch::nn::Module& module) {
  std::vector<std::string> result;
  for (const auto& named : module.named_parameters()) {
    std::ostringstream text;
    text << named.key() << " " << named.value().sizes();
    result.push_back(text.str());
  }
  return result;
}

TEST(GatedDeltaNetLayer, ParametersAreTheContracts) {
  using Names = std::vector<std::string>;
  EXPECT_EQ(describe_parameters(*GatedDeltaNet(tiny_options())),
            (Names{"A_log [4]", "dt_bias [4]", "q_proj.weight [16, 24]", "k_proj.weight [16, 24]",
                   "v_proj.weight [48, 24]", "a_proj.weight [4, 24]", "b_proj.weight [4, 24]",
                   "q_conv1d.weight [16, 1, 4]", "k_conv1d.weight [16, 1, 4]",
                   "v_conv1d.weight [48, 1, 4]", "g_proj.weight [48, 24]", "o_norm.weight [12]",
                   "o_proj.weight [24, 48]"}));
  GatedDeltaNetOptions bare = tiny_options();
  bare.use_gate = bare.use_short_conv = false;
  EXPECT_EQ(describe_parameters(*GatedDeltaNet(bare)),
            (Names{"A_log [4]", "dt_bias [4]", "q_proj.weight [16, 24]", "k_proj.weight [16, 24]",
                   "v_proj.weight [48, 24]", "a_proj.weight [4, 24]", "b_proj.weight [4, 24]",
                   "o_norm.weight [12]", "o_proj.weight [24, 48]"}));
  GatedDeltaNetOptions biased = tiny_options();
  biased.conv_bias = true;
  EXPECT_EQ(GatedDeltaNet(biased)->named_parameters()["v_conv1d.bias"].sizes(),
            at::IntArrayRef({48}));
}

TEST(GatedDeltaNetLayer, GatesStartAsTheContractSays) {
  torch::manual_seed(1);
  GatedDeltaNetOptions options = tiny_options();
  options.num_heads = options.num_v_heads.emplace(4000);
  options.hidden_size = options.head_dim = 1;
  options.expand_v = 1;
  const GatedDeltaNet layer(options);
  const at::Tensor A = layer->A_log.exp();
  EXPECT_GE(A.min().item<float>(), 0.0F);
  EXPECT_LE(A.max().item<float>(), 16.0F);
  // Mean 8 and deviation 16/sqrt(12) of a uniform law; five standard errors of 4000 draws.
  EXPECT_NEAR(A.mean().item<float>(), 8.0, 5 * 4.62 / std::sqrt(4000.0));
  EXPECT_NEAR(A.std().item<float>(), 4.62, 5 * 4.62 / std::sqrt(2 * 4000.0));
  const at::Tensor log_step = torch::softplus(layer->dt_bias).log();
  EXPECT_GE(log_step.min().item<float>(), std::log(1e-3) - 1e-4);
  EXPECT_LE(log_step.max().item<float>(), std::log(1e-1) + 1e-4);
  EXPECT_NEAR(log_step.mean().item<float>(), std::log(1e-2), 5 * 1.33 / std::sqrt(4000.0));
  EXPECT_NEAR(log_step.std().item<float>(), 1.33, 5 * 1.33 / std::sqrt(2 * 4000.0));
}

TEST(GatedDeltaNetLayer, GateParametersStayFp32) {
  GatedDeltaNet layer(tiny_options());
  const at::Tensor A_log = layer->A_log.clone();
  layer->to(torch::kBFloat16);
  EXPECT_EQ(layer->q_proj->weight.scalar_type(), torch::kBFloat16);
  EXPECT_EQ(layer->A_log.scalar_type(), torch::kFloat);
  EXPECT_EQ(layer->dt_bias.scalar_type(), torch::kFloat);
  EXPECT_TRUE(torch::equal(layer->A_log, A_log));
  EXPECT_EQ(layer->named_parameters()["A_log"].scalar_type(), torch::kFloat);
  layer->to(torch::Device(torch::kCPU), torch::kHalf);
  EXPECT_EQ(layer->A_log.scalar_type(), torch::kFloat);
  layer->to(torch::kDouble);
  EXPECT_EQ(layer->A_log.scalar_type(), torch::kDouble);
}

struct Variant {
  const char* name;
  bool use_gate = true, use_short_conv = true, allow_neg_eigval = false, conv_bias = false;
  const char* mode = "chunk";
};

class LayerVariant : public ::testing::TestWithParam<Variant> {
 protected:
  GatedDeltaNet make() const {
    GatedDeltaNetOptions options = tiny_options();
    options.use_gate = GetParam().use_gate;
    options.use_short_conv = GetParam().use_short_conv;
    options.allow_neg_eigval = GetParam().allow_neg_eigval;
    options.conv_bias = GetParam().conv_bias;
    options.mode = GetParam().mode;
    torch::manual_seed(3);
    GatedDeltaNet layer(options);
    layer->eval();
    return layer;
  }
};

/// In fp32 and bf16, in the chunked form and in the recurrent one.
TEST_P(LayerVariant, EqualsPlainOperators) {
  const torch::NoGradGuard no_grad;
  GatedDeltaNet layer = make();
  for (const auto dtype : {torch::kFloat, torch::kBFloat16}) {
    layer->to(dtype);
    for (const int64_t T : {90, 5}) {
      SCOPED_TRACE(std::string(c10::toString(dtype)) + ", T " + std::to_string(T));
      const at::Tensor x = torch::randn({2, T, 24}).to(dtype);
      const auto plain = [&](at::ScalarType type) {
        return plain_gated_deltanet(weights_of(*layer, type), "", layer->options, x.to(type));
      };
      expect_as_good_as_plain(layer->forward({.hidden_states = x}), plain(dtype),
                              plain(torch::kDouble));
    }
  }
}

/// Any split of the tokens over calls, in the modes that their lengths choose.
TEST_P(LayerVariant, CachedEqualsWhole) {
  const torch::NoGradGuard no_grad;
  GatedDeltaNet layer = make();
  const at::Tensor x = torch::randn({2, 90, 24});
  const at::Tensor whole = layer->forward({.hidden_states = x});
  for (const std::vector<int64_t>& lengths :
       std::vector<std::vector<int64_t>>{{90}, {1, 89}, {89, 1}, {2, 70, 3, 15}, {66, 0, 24}}) {
    LayerCache cache;
    std::vector<at::Tensor> parts;
    for (const at::Tensor& part : x.split_with_sizes(lengths, 1)) {
      parts.push_back(layer->forward({.hidden_states = part, .cache = &cache}));
    }
    expect_close(torch::cat(parts, 1), whole);
  }
}

TEST_P(LayerVariant, PaddedEqualsUnpadded) {
  const torch::NoGradGuard no_grad;
  GatedDeltaNet layer = make();
  const at::Tensor x = torch::randn({3, 70, 24});
  at::Tensor mask = torch::ones({3, 70}, torch::kLong);
  mask[0].narrow(0, 0, 68).fill_(0);
  mask[1].fill_(0);  // nothing but padding
  LayerCache cache;
  const at::Tensor padded =
      layer->forward({.hidden_states = x.masked_fill((mask == 0).unsqueeze(-1), NAN),
                      .attention_mask = mask,
                      .cache = &cache});
  expect_close(padded[0].narrow(0, 68, 2),
               layer->forward({.hidden_states = x[0].narrow(0, 68, 2).unsqueeze(0)})[0]);
  expect_close(padded[2], layer->forward({.hidden_states = x[2].unsqueeze(0)})[0]);
  EXPECT_TRUE((padded[1] == 0).all().item<bool>());
  EXPECT_TRUE((cache.recurrent_state[1] == 0).all().item<bool>());

  // Padding between two pieces of a row changes nothing either.
  at::Tensor next = torch::randn({3, 5, 24}), next_mask = torch::ones({3, 5}, torch::kBool);
  next_mask[2].narrow(0, 0, 3).fill_(false);
  const at::Tensor continued =
      layer->forward({.hidden_states = next, .attention_mask = next_mask, .cache = &cache});
  const at::Tensor row = torch::cat({x[2], next[2].narrow(0, 3, 2)}).unsqueeze(0);
  expect_close(continued[2].narrow(0, 3, 2),
               layer->forward({.hidden_states = row})[0].narrow(0, 70, 2));
}

INSTANTIATE_TEST_SUITE_P(
    All, LayerVariant,
    ::testing::Values(Variant{.name = "plain"}, Variant{.name = "no_gate", .use_gate = false},
                      Variant{.name = "no_conv", .use_short_conv = false},
                      Variant{.name = "negative_eigenvalues", .allow_neg_eigval = true},
                      Variant{.name = "conv_bias", .conv_bias = true},
                      Variant{.name = "recurrent", .mode = "fused_recurrent"}),
    [](const auto& info) { return info.param.name; });

TEST(GatedDeltaNetLayer, RecomputesTheSameBits) {
  const auto results = [](bool recompute, bool gate) {
    torch::manual_seed(3);
    GatedDeltaNet layer(GatedDeltaNetOptions{.hidden_size = 24,
                                             .expand_v = 1.5,
                                             .head_dim = 8,
                                             .num_heads = 2,
                                             .num_v_heads = 4,
                                             .use_gate = gate,
                                             .conv_bias = true,
                                             .recompute = recompute});
    const at::Tensor x = torch::randn({1, 70, 24}).requires_grad_();
    const at::Tensor output =
        layer->forward({.hidden_states = x, .cu_seqlens = torch::tensor({0, 30, 70})});
    output.square().sum().backward();
    std::vector<at::Tensor> found = {output, x.grad()};
    for (const at::Tensor& parameter : layer->parameters()) found.push_back(parameter.grad());
    return found;
  };
  for (const bool gate : {true, false}) {
    const auto got = results(true, gate), want = results(false, gate);
    ASSERT_EQ(got.size(), want.size());
    for (size_t i = 0; i < want.size(); ++i) {
      ASSERT_TRUE(got[i].defined()) << i;
      EXPECT_TRUE(torch::equal(got[i], want[i])) << i;
    }
  }
}

TEST(GatedDeltaNetLayer, DecodingUpdatesItsStateInPlace) {
  const torch::NoGradGuard no_grad;
  GatedDeltaNet layer(tiny_options());
  layer->eval();
  LayerCache cache;
  layer->forward({.hidden_states = torch::randn({2, 1, 24}), .cache = &cache});
  const void* const state = cache.recurrent_state.const_data_ptr();
  const void* const inputs = cache.conv_v.const_data_ptr();
  const at::Tensor before = cache.recurrent_state.clone();
  layer->forward({.hidden_states = torch::randn({2, 1, 24}), .cache = &cache});
  EXPECT_EQ(cache.recurrent_state.const_data_ptr(), state);
  EXPECT_EQ(cache.conv_v.const_data_ptr(), inputs);
  EXPECT_FALSE(torch::equal(cache.recurrent_state, before));
}

TEST(GatedDeltaNetLayer, RejectsWhatCannotBe) {
  const auto rejected = [](auto change, const std::string& message) {
    GatedDeltaNetOptions options = tiny_options();
    change(options);
    EXPECT_NE(message_of<c10::ValueError>([&] { GatedDeltaNet layer(options); }).find(message),
              std::string::npos);
  };
  using Options = GatedDeltaNetOptions&;
  rejected([](Options o) { o.mode = "fast"; }, "mode must be \"chunk\" or");
  rejected([](Options o) { o.num_v_heads = 3; }, "num_v_heads must be a multiple of num_heads");
  rejected([](Options o) { o.expand_v = 1.01; }, "expand_v must be such that");
  rejected([](Options o) { o.hidden_size = 0; }, "hidden_size must be positive, got 0");

  GatedDeltaNet layer(tiny_options());
  const auto fails = [&](const MixerInput& input, const std::string& message) {
    EXPECT_NE(message_of<c10::ValueError>([&] { layer->forward(input); }).find(message),
              std::string::npos);
  };
  const at::Tensor x = torch::randn({2, 6, 24});
  fails({.hidden_states = torch::randn({2, 6, 23})}, "hidden_states must be of shape");
  fails({.hidden_states = x, .attention_mask = torch::ones({2, 5})}, "attention_mask must be");
  const at::Tensor right = torch::tensor({{1, 1, 1, 1, 1, 0}, {1, 1, 1, 1, 1, 1}});
  fails({.hidden_states = x, .attention_mask = right}, "0 for padding on the left");
  fails({.hidden_states = x, .cu_seqlens = torch::tensor({0, 6})}, "cu_seqlens must be");
  fails({.hidden_states = x[0].unsqueeze(0), .cu_seqlens = torch::tensor({0, 5})}, "cu_seqlens");
  fails({.hidden_states = x[0].unsqueeze(0),
         .attention_mask = torch::ones({1, 6}),
         .cu_seqlens = torch::tensor({0, 6})},
        "attention_mask must be absent with cu_seqlens");
  LayerCache cache;
  layer->forward({.hidden_states = torch::randn({3, 6, 24}), .cache = &cache});
  fails({.hidden_states = x, .cache = &cache}, "cache.recurrent_state must be of shape");
}

/// softmax(q k^T / sqrt(D)) v in plain loops over what each token may see.
at::Tensor plain_attention(AttentionImpl& layer, const at::Tensor& x, int64_t window) {
  const int64_t T = x.size(0), D = layer.options.hidden_size / layer.options.num_heads;
  const int64_t groups =
      layer.options.num_heads / layer.options.num_kv_heads.value_or(layer.options.num_heads);
  const auto project = [&](Linear& linear, RMSNorm* norm) {
    at::Tensor heads = linear(x).view({T, -1, D});
    if (norm != nullptr && !norm->is_empty()) heads = (*norm)(heads);
    return heads;
  };
  const auto turn = [&](const at::Tensor& y) {  // complex rotation of pairs (i, i + D/2)
    at::Tensor turned = y.clone();
    for (int64_t t = 0; t < T; ++t) {
      for (int64_t i = 0; i < D / 2; ++i) {
        const double angle = t * std::pow(layer.options.rope_theta, -2.0 * i / D);
        const at::Tensor a = y[t].select(1, i), b = y[t].select(1, i + D / 2);
        turned[t].select(1, i).copy_(a * std::cos(angle) - b * std::sin(angle));
        turned[t].select(1, i + D / 2).copy_(b * std::cos(angle) + a * std::sin(angle));
      }
    }
    return turned;
  };
  const at::Tensor q = turn(project(layer.q_proj, &layer.q_norm));
  const at::Tensor k = turn(project(layer.k_proj, &layer.k_norm));
  const at::Tensor v = project(layer.v_proj, nullptr);
  at::Tensor o = torch::zeros_like(q);
  for (int64_t t = 0; t < T; ++t) {
    const int64_t first = std::max<int64_t>(0, t - window + 1);
    for (int64_t h = 0; h < layer.options.num_heads; ++h) {
      const at::Tensor keys = k.narrow(0, first, t + 1 - first).select(1, h / groups);
      const at::Tensor values = v.narrow(0, first, t + 1 - first).select(1, h / groups);
      const at::Tensor weights = torch::softmax(keys.mv(q[t][h]) / std::sqrt(double(D)), 0);
      o[t][h].copy_(weights.matmul(values));
    }
  }
  return layer.o_proj(o.flatten(1));
}

class AttentionWindow : public ::testing::TestWithParam<int64_t> {
 protected:
  int64_t window() const { return GetParam() > 0 ? GetParam() : INT64_MAX; }
  Attention make() const {
    AttentionOptions options{
        .hidden_size = 24, .num_heads = 6, .num_kv_heads = 2, .qkv_bias = true};
    options.qk_norm = true;
    if (GetParam() > 0) options.window_size = GetParam();
    torch::manual_seed(4);
    Attention layer(options);
    layer->eval();
    return layer;
  }
};

TEST_P(AttentionWindow, EqualsPlainLoops) {
  const torch::NoGradGuard no_grad;
  Attention layer = make();
  const at::Tensor x = torch::randn({2, 17, 24});
  const at::Tensor y = layer->forward({.hidden_states = x});
  for (int64_t b = 0; b < 2; ++b) expect_close(y[b], plain_attention(*layer, x[b], window()));
}

TEST_P(AttentionWindow, CachedEqualsWhole) {
  const torch::NoGradGuard no_grad;
  Attention layer = make();
  const at::Tensor x = torch::randn({2, 600, 24});  // longer than a block of queries
  const at::Tensor whole = layer->forward({.hidden_states = x});
  for (const std::vector<int64_t>& lengths :
       std::vector<std::vector<int64_t>>{{1, 599}, {3, 1, 1, 0, 595}, {580, 20}}) {
    LayerCache cache;
    std::vector<at::Tensor> parts;
    for (const at::Tensor& part : x.split_with_sizes(lengths, 1)) {
      parts.push_back(layer->forward({.hidden_states = part, .cache = &cache}));
      EXPECT_LT(cache.attn_key.size(2), window());
    }
    expect_close(torch::cat(parts, 1), whole);
  }
}

TEST_P(AttentionWindow, PaddedEqualsUnpaddedAlsoLater) {
  const torch::NoGradGuard no_grad;
  Attention layer = make();
  const std::vector<std::vector<int64_t>> tokens = {{7, 1, 4, 1}, {2, 5, 0, 3}, {0, 1, 2, 1}};
  LayerCache cache;
  std::vector<at::Tensor> rows(3, torch::empty({0, 24}));
  std::vector<at::Tensor> outputs(3, torch::empty({0, 24}));
  for (size_t step = 0; step < 4; ++step) {
    const at::Tensor x = torch::randn({3, 8, 24}), mask = torch::zeros({3, 8}, torch::kLong);
    for (int64_t b = 0; b < 3; ++b) {
      const int64_t n = tokens[b][step];
      mask[b].narrow(0, 8 - n, n).fill_(1);
      rows[b] = torch::cat({rows[b], x[b].narrow(0, 8 - n, n)});
    }
    const at::Tensor y =
        layer->forward({.hidden_states = x, .attention_mask = mask, .cache = &cache});
    for (int64_t b = 0; b < 3; ++b) {
      const int64_t n = tokens[b][step];
      outputs[b] = torch::cat({outputs[b], y[b].narrow(0, 8 - n, n)});
    }
  }
  for (int64_t b = 0; b < 3; ++b) {
    expect_close(outputs[b], layer->forward({.hidden_states = rows[b].unsqueeze(0)})[0]);
  }
}

INSTANTIATE_TEST_SUITE_P(Windows, AttentionWindow, ::testing::Values(0, 1, 2, 5, 100));

TEST(AttentionLayer, RejectsWhatCannotBe) {
  const auto rejected = [](const AttentionOptions& options, const std::string& message) {
    EXPECT_NE(message_of<c10::ValueError>([&] { Attention layer(options); }).find(message),
              std::string::npos);
  };
  rejected({.hidden_size = 25, .num_heads = 4}, "num_heads must be a divisor");
  rejected({.hidden_size = 12, .num_heads = 4}, "head_dim must be positive and even, got 3");
  rejected({.hidden_size = 24, .num_heads = 4, .num_kv_heads = 3}, "num_kv_heads must be");
  rejected({.hidden_size = 24, .num_heads = 4, .window_size = 0}, "window_size must be positive");
  Attention layer(AttentionOptions{.hidden_size = 24, .num_heads = 4});
  LayerCache cache;
  layer->forward({.hidden_states = torch::randn({2, 3, 24}), .cache = &cache});
  EXPECT_NE(message_of<c10::ValueError>([&] {
              layer->forward({.hidden_states = torch::randn({3, 1, 24}), .cache = &cache});
            }).find("cache.attn_tokens must be of shape"),
            std::string::npos);
}

TEST(Packing, UnpadAndRepadAreInverse) {
  const at::Tensor mask = torch::tensor({{0, 0, 1}, {1, 1, 1}, {0, 0, 0}});
  const auto padding = find_padding("test", mask, 3, 3);
  ASSERT_TRUE(padding.has_value());
  EXPECT_TRUE(torch::equal(padding->cu_seqlens, torch::tensor({0, 1, 4, 4})));
  const at::Tensor x = torch::randn({3, 3, 2});
  EXPECT_EQ(padding->unpad(x).sizes(), at::IntArrayRef({1, 4, 2}));
  EXPECT_TRUE(torch::equal(padding->repad(padding->unpad(x)), x * mask.unsqueeze(-1)));
  EXPECT_FALSE(find_padding("test", torch::ones({2, 4}), 2, 4).has_value());
}

}  // namespace
}  // namespace gdn::testing
