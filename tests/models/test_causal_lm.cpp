// The language model: keys, initial values, and the identities of packing, padding and caching.
#include <ATen/autocast_mode.h>

#include "models/plain_model.h"
#include "models/tiny_models.h"

namespace gdn::testing {
namespace {

std::vector<std::string> keys(const GatedDeltaNetForCausalLM& model) {
  std::vector<std::string> result;
  for (const auto& named : model->named_parameters()) result.push_back(named.key());
  return result;
}

TEST(CausalLM, KeysAreTheContracts) {
  GatedDeltaNetConfig config = tiny_config();
  config.num_hidden_layers = 2;
  config.attn = {{.layers = {1}, .num_heads = 4, .qkv_bias = true, .qk_norm = true}};
  const std::vector<std::string> expected = {"model.embeddings.weight",
                                             "model.layers.0.attn_norm.weight",
                                             "model.layers.0.attn.A_log",
                                             "model.layers.0.attn.dt_bias",
                                             "model.layers.0.attn.q_proj.weight",
                                             "model.layers.0.attn.k_proj.weight",
                                             "model.layers.0.attn.v_proj.weight",
                                             "model.layers.0.attn.a_proj.weight",
                                             "model.layers.0.attn.b_proj.weight",
                                             "model.layers.0.attn.q_conv1d.weight",
                                             "model.layers.0.attn.k_conv1d.weight",
                                             "model.layers.0.attn.v_conv1d.weight",
                                             "model.layers.0.attn.g_proj.weight",
                                             "model.layers.0.attn.o_norm.weight",
                                             "model.layers.0.attn.o_proj.weight",
                                             "model.layers.0.mlp_norm.weight",
                                             "model.layers.0.mlp.gate_proj.weight",
                                             "model.layers.0.mlp.up_proj.weight",
                                             "model.layers.0.mlp.down_proj.weight",
                                             "model.layers.1.attn_norm.weight",
                                             "model.layers.1.attn.q_proj.weight",
                                             "model.layers.1.attn.q_proj.bias",
                                             "model.layers.1.attn.k_proj.weight",
                                             "model.layers.1.attn.k_proj.bias",
                                             "model.layers.1.attn.v_proj.weight",
                                             "model.layers.1.attn.v_proj.bias",
                                             "model.layers.1.attn.o_proj.weight",
                                             "model.layers.1.attn.q_norm.weight",
                                             "model.layers.1.attn.k_norm.weight",
                                             "model.layers.1.mlp_norm.weight",
                                             "model.layers.1.mlp.gate_proj.weight",
                                             "model.layers.1.mlp.up_proj.weight",
                                             "model.layers.1.mlp.down_proj.weight",
                                             "model.norm.weight",
                                             "lm_head.weight"};
  EXPECT_EQ(keys(make_model(config)), expected);
  EXPECT_TRUE(make_model(config)->buffers().empty());
  config.tie_word_embeddings = true;
  EXPECT_EQ(keys(make_model(config)),
            std::vector<std::string>(expected.begin(), expected.end() - 1));
}

TEST(CausalLM, InitialValues) {
  GatedDeltaNetConfig config = hybrid_config();
  config.initializer_range = 0.05;
  config.hidden_size = 256;
  for (const auto& named : make_model(config)->named_parameters()) {
    const std::string& key = named.key();
    const at::Tensor& value = named.value();
    if (key.find("norm") != std::string::npos) {
      EXPECT_TRUE((value == 1).all().item<bool>()) << key;
    } else if (key.ends_with(".bias")) {
      EXPECT_TRUE((value == 0).all().item<bool>()) << key;
    } else if (key.ends_with(".weight")) {
      const double n = static_cast<double>(value.numel());  // five standard errors
      EXPECT_NEAR(value.mean().item<double>(), 0, 5 * 0.05 / std::sqrt(n)) << key;
      EXPECT_NEAR(value.std().item<double>(), 0.05, 5 * 0.05 / std::sqrt(2 * n)) << key;
    }
  }
}

TEST(CausalLM, CountsEveryParameterOnce) {
  GatedDeltaNetConfig config = tiny_config();
  const int64_t D = 48, key = 32, value = 96, HV = 4, W = 4;
  const int64_t layer =
      D * (2 * key + 3 * value + 2 * HV) + 2 * HV + W * (2 * key + value) + 24 + 2 * D + 3 * D * 64;
  const int64_t body = 2 * layer + D + 61 * D;
  EXPECT_EQ(make_model(config)->parameter_count(), body + 61 * D);
  config.tie_word_embeddings = true;
  EXPECT_EQ(make_model(config)->parameter_count(), body);
}

TEST(CausalLM, FuseOptionsChangeNothingButRounding) {
  const at::Tensor ids = random_ids(tiny_config(), 2, 70);
  const auto loss = [&](auto change) {
    GatedDeltaNetConfig config = tiny_config();
    change(config);
    return make_model(config)->forward({.input_ids = ids, .labels = ids}).loss;
  };
  using Config = GatedDeltaNetConfig&;
  const at::Tensor expected = loss([](Config) {});
  EXPECT_EQ(expected.scalar_type(), torch::kFloat);
  EXPECT_EQ(expected.dim(), 0);
  expect_close(loss([](Config c) { c.fuse_norm = false; }), expected);
  expect_close(loss([](Config c) { c.fuse_swiglu = false; }), expected);
  expect_close(loss([](Config c) { c.fuse_cross_entropy = false; }), expected);
  expect_close(loss([](Config c) {
                 c.fuse_cross_entropy = false;
                 c.fuse_linear_cross_entropy = true;
               }),
               expected);
}

TEST(CausalLM, LossComparesEachPositionWithTheNextLabel) {
  GatedDeltaNetForCausalLM model = make_model(tiny_config());
  const at::Tensor ids = random_ids(tiny_config(), 2, 9);
  at::Tensor labels = ids.clone();
  labels[0].narrow(0, 3, 4).fill_(-100);
  const CausalLMOutput output = model->forward({.input_ids = ids, .labels = labels});
  double sum = 0;
  int64_t count = 0;
  for (int64_t b = 0; b < 2; ++b) {
    for (int64_t t = 0; t + 1 < 9; ++t) {
      const auto label = labels[b][t + 1].item<int64_t>();
      if (label == -100) continue;
      sum -= torch::log_softmax(output.logits[b][t].to(torch::kDouble), 0)[label].item<double>();
      ++count;
    }
  }
  EXPECT_EQ(count, 12);
  EXPECT_NEAR(output.loss.item<double>(), sum / static_cast<double>(count), 1e-5);
}

class Kind : public ::testing::TestWithParam<bool> {
 protected:
  static GatedDeltaNetConfig config() { return GetParam() ? hybrid_config() : tiny_config(); }
};

TEST_P(Kind, CachedDecodingEqualsWhole) {
  const torch::NoGradGuard no_grad;
  GatedDeltaNetForCausalLM model = make_model(config());
  const at::Tensor ids = random_ids(config(), 2, 80);
  const at::Tensor whole = model->forward({.input_ids = ids}).logits;
  std::vector<std::vector<int64_t>> splits = {{80}, {79, 1}, {1, 79}, {66, 13, 1}, {10, 0, 70}};
  splits.push_back(std::vector<int64_t>(80, 1));
  for (const auto& lengths : splits) {
    Cache cache;
    std::vector<at::Tensor> parts;
    for (const at::Tensor& part : ids.split_with_sizes(lengths, 1)) {
      parts.push_back(model->forward({.input_ids = part, .cache = &cache}).logits);
    }
    EXPECT_EQ(cache.seen_tokens, 80);
    expect_close(torch::cat(parts, 1), whole);
  }
}

TEST_P(Kind, LeftPaddedEqualsUnpadded) {
  GatedDeltaNetForCausalLM model = make_model(config());
  const std::vector<int64_t> lengths = {12, 70, 1};
  const at::Tensor ids = random_ids(config(), 3, 70), mask = torch::zeros({3, 70}, torch::kLong);
  const at::Tensor steps = random_ids(config(), 3, 4, 2);
  for (int64_t b = 0; b < 3; ++b) mask[b].narrow(0, 70 - lengths[b], lengths[b]).fill_(1);
  Cache cache;
  const at::Tensor last =
      model
          ->forward(
              {.input_ids = ids, .attention_mask = mask, .cache = &cache, .logits_to_keep = 1})
          .logits;
  EXPECT_EQ(last.size(1), 1);
  const at::Tensor continued = model->forward({.input_ids = steps, .cache = &cache}).logits;
  const CausalLMOutput padded =
      model->forward({.input_ids = ids, .attention_mask = mask, .labels = ids});
  at::Tensor sum = torch::zeros({});
  for (int64_t b = 0; b < 3; ++b) {
    const at::Tensor row = ids[b].narrow(0, 70 - lengths[b], lengths[b]).unsqueeze(0);
    const CausalLMOutput alone = model->forward({.input_ids = row, .labels = row});
    expect_close(padded.logits[b].narrow(0, 70 - lengths[b], lengths[b]), alone.logits[0]);
    expect_close(last[b][0], alone.logits[0][lengths[b] - 1]);
    sum = sum + alone.loss * static_cast<double>(lengths[b] - 1);
    const at::Tensor longer = torch::cat({row, steps[b].unsqueeze(0)}, 1);
    expect_close(continued[b],
                 model->forward({.input_ids = longer}).logits[0].narrow(0, lengths[b], 4));
  }
  expect_close(padded.loss, sum / (11 + 69));
}

TEST_P(Kind, PackedEqualsSeparateWithGradients) {
  const std::vector<int64_t> lengths = {1, 30, 0, 67, 2};
  const at::Tensor ids = random_ids(config(), 1, 100);
  const at::Tensor cu_seqlens = torch::tensor({0, 1, 31, 31, 98, 100}, torch::kInt);
  GatedDeltaNetForCausalLM packed_model = make_model(config(), /*training=*/true);
  const CausalLMOutput packed =
      packed_model->forward({.input_ids = ids, .cu_seqlens = cu_seqlens, .labels = ids});
  packed.loss.backward();

  GatedDeltaNetForCausalLM model = make_model(config(), /*training=*/true);
  std::vector<at::Tensor> logits;
  at::Tensor loss = torch::zeros({});
  for (const at::Tensor& row : ids.split_with_sizes(lengths, 1)) {
    if (row.size(1) == 0) continue;
    const CausalLMOutput output = model->forward({.input_ids = row, .labels = row});
    logits.push_back(output.logits);
    loss = loss + output.loss * static_cast<double>(row.size(1) - 1) / (29 + 66 + 1);
  }
  loss.backward();
  expect_close(packed.logits, torch::cat(logits, 1));
  expect_close(packed.loss, loss);
  const auto got = gradients(packed_model), expected = gradients(model);
  for (size_t i = 0; i < got.size(); ++i) {
    SCOPED_TRACE(keys(model)[i]);
    EXPECT_GT(expected[i].abs().max().item<double>(), 0);
    expect_close(got[i], expected[i], 4 * kReordered);
  }
}

TEST_P(Kind, CheckpointedGradientsEqualPlain) {
  const at::Tensor ids = random_ids(config(), 2, 40);
  for (const bool autocast : {false, true}) {
    const auto run = [&](bool checkpointing) {
      GatedDeltaNetForCausalLM model = make_model(config(), /*training=*/true);
      model->set_activation_checkpointing(checkpointing);
      at::autocast::set_autocast_enabled(at::kCPU, autocast);
      at::autocast::set_autocast_dtype(at::kCPU, at::kBFloat16);
      const at::Tensor loss = model->forward({.input_ids = ids, .labels = ids}).loss;
      at::autocast::clear_cache();
      at::autocast::set_autocast_enabled(at::kCPU, false);
      loss.backward();
      auto result = gradients(model);
      result.push_back(loss.detach());
      return result;
    };
    const auto plain = run(false), recomputed = run(true);
    for (size_t i = 0; i < plain.size(); ++i) {
      EXPECT_TRUE(torch::equal(recomputed[i], plain[i])) << i << " autocast " << autocast;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Kinds, Kind, ::testing::Bool(),
                         [](const auto& info) { return info.param ? "hybrid" : "pure"; });

TEST(CausalLM, CheckpointingRespectsFrozenParametersAndGradOfLists) {
  const at::Tensor ids = random_ids(tiny_config(), 1, 20);
  const auto run = [&](bool checkpointing) {
    GatedDeltaNetForCausalLM model = make_model(tiny_config(), /*training=*/true);
    model->set_activation_checkpointing(checkpointing);
    std::vector<at::Tensor> wanted;
    for (auto& named : model->named_parameters()) {
      const bool frozen = named.key().find("embeddings") != std::string::npos ||
                          named.key().find("layers.0.attn.k_proj") != std::string::npos;
      named.value().requires_grad_(!frozen);
      if (!frozen) wanted.push_back(named.value());
    }
    const at::Tensor loss = model->forward({.input_ids = ids, .labels = ids}).loss;
    return torch::autograd::grad({loss}, wanted);
  };
  const auto plain = run(false), recomputed = run(true);
  for (size_t i = 0; i < plain.size(); ++i) EXPECT_TRUE(torch::equal(recomputed[i], plain[i]));
}

TEST(CausalLM, EqualsPlainOperators) {
  const torch::NoGradGuard no_grad;
  GatedDeltaNetConfig one = tiny_config(), other = tiny_config();
  one.conv_size = 3;
  one.norm_eps = 1e-2;
  other.use_gate = other.use_short_conv = false;
  other.allow_neg_eigval = true;
  for (const GatedDeltaNetConfig& config : {one, other}) {
    GatedDeltaNetForCausalLM model = make_model(config);
    for (const at::Tensor& parameter : model->parameters()) {  // not all norms alike
      if (parameter.dim() == 1) parameter.mul_(1 + 0.3 * torch::randn_like(parameter));
    }
    const at::Tensor ids = random_ids(config, 2, 70);
    const auto plain = [&](at::ScalarType dtype) {
      return plain_logits(weights_of(*model, dtype), config, ids);
    };
    expect_as_good_as_plain(model->forward({.input_ids = ids}).logits, plain(torch::kFloat),
                            plain(torch::kDouble));
  }
}

TEST(CausalLM, AttentionOptionsReachTheLayers) {
  const at::Tensor ids = random_ids(hybrid_config(), 1, 20);
  const auto logits = [&](auto change) {
    GatedDeltaNetConfig config = hybrid_config();
    change(config.attn[1]);
    return make_model(config)->forward({.input_ids = ids}).logits;
  };
  const at::Tensor plain = logits([](AttentionConfig&) {});
  EXPECT_FALSE(torch::equal(logits([](AttentionConfig& a) { a.rope_theta = 100; }), plain));
  EXPECT_FALSE(torch::equal(logits([](AttentionConfig& a) { a.window_size = 6; }), plain));
}

TEST(CausalLM, NarrowModelsKeepGatesWide) {
  const torch::NoGradGuard no_grad;
  const GatedDeltaNetConfig config = tiny_config();
  GatedDeltaNetForCausalLM model = make_model(config);
  const at::Tensor ids = random_ids(config, 2, 40);
  model->to(torch::kBFloat16);
  for (const auto& named : model->named_parameters()) {
    const bool gate = named.key().ends_with("A_log") || named.key().ends_with("dt_bias");
    EXPECT_EQ(named.value().scalar_type(), gate ? torch::kFloat : torch::kBFloat16);
  }
  const at::Tensor plain = plain_logits(weights_of(*model, torch::kBFloat16), config, ids);
  const at::Tensor exact = plain_logits(weights_of(*model, torch::kDouble), config, ids);
  expect_as_good_as_plain(model->forward({.input_ids = ids}).logits, plain, exact);
  Cache cache;
  std::vector<at::Tensor> parts;
  for (const at::Tensor& part : ids.split(20, 1)) {
    parts.push_back(model->forward({.input_ids = part, .cache = &cache}).logits);
  }
  expect_as_good_as_plain(torch::cat(parts, 1), plain, exact);
}

TEST(CausalLM, LogitsToKeep) {
  GatedDeltaNetForCausalLM model = make_model(tiny_config());
  const at::Tensor ids = random_ids(tiny_config(), 2, 9);
  const at::Tensor all = model->forward({.input_ids = ids}).logits;
  EXPECT_EQ(all.sizes(), at::IntArrayRef({2, 9, 61}));
  for (const int64_t n : {1, 4, 9, 100}) {
    const int64_t kept = std::min<int64_t>(n, 9);
    expect_close(model->forward({.input_ids = ids, .logits_to_keep = n}).logits,
                 all.narrow(1, 9 - kept, kept));
  }
}

TEST(CausalLM, CacheOfGatedDeltaNetDoesNotGrow) {
  const torch::NoGradGuard no_grad;
  GatedDeltaNetForCausalLM model = make_model(tiny_config());
  Cache cache;
  EXPECT_EQ(cache.nbytes(), 0);
  model->forward({.input_ids = random_ids(tiny_config(), 2, 3), .cache = &cache});
  const int64_t bytes = cache.nbytes();
  EXPECT_EQ(bytes, 2 * 2 * 4 * (4 * 16 * 24 + 3 * (32 + 32 + 96)));  // layers B fp32 (S + inputs)
  model->forward({.input_ids = random_ids(tiny_config(), 2, 500), .cache = &cache});
  EXPECT_EQ(cache.nbytes(), bytes);
}

TEST(CausalLM, CacheRowsCanBeSelected) {
  const torch::NoGradGuard no_grad;
  GatedDeltaNetForCausalLM model = make_model(hybrid_config());
  const at::Tensor ids = random_ids(hybrid_config(), 3, 12);
  Cache cache;
  model->forward({.input_ids = ids.narrow(1, 0, 10), .cache = &cache});
  cache.select_rows(torch::tensor({2, 0}));
  const at::Tensor rows = ids.index_select(0, torch::tensor({2, 0}));
  expect_close(model->forward({.input_ids = rows.narrow(1, 10, 2), .cache = &cache}).logits,
               model->forward({.input_ids = rows, .logits_to_keep = 2}).logits);
}

TEST(CausalLM, RejectsWhatCannotBe) {
  const GatedDeltaNetConfig config = tiny_config();
  GatedDeltaNetForCausalLM model = make_model(config);
  const at::Tensor ids = random_ids(config, 1, 6);
  const auto fails = [&](const CausalLMInput& input, const std::string& text) {
    const std::string message = message_of<c10::ValueError>([&] { model->forward(input); });
    EXPECT_NE(message.find("GatedDeltaNetForCausalLM: " + text), std::string::npos) << message;
  };
  fails({.input_ids = ids[0]}, "input_ids must be of shape [B, T]");
  fails({.input_ids = ids.to(torch::kInt)}, "input_ids must be int64");
  fails({.input_ids = torch::full({1, 2}, 61)},
        "input_ids must be from 0 to vocab_size - 1 = 60, got 61");
  fails({.input_ids = torch::full({1, 2}, -1)}, "input_ids must be from 0");
  fails({.input_ids = ids, .labels = ids.narrow(1, 0, 5)}, "labels must be of shape");
  fails({.input_ids = ids, .labels = ids.to(torch::kInt)}, "labels must be int64");
  fails({.input_ids = ids, .logits_to_keep = -1}, "logits_to_keep must be 0 or more, got -1");
  fails({.input_ids = ids, .attention_mask = torch::ones({1, 5})}, "attention_mask must be");
  fails({.input_ids = ids, .cu_seqlens = torch::tensor({0, 4})}, "cu_seqlens");
  fails({.input_ids = ids,
         .attention_mask = torch::ones({1, 6}),
         .cu_seqlens = torch::tensor({0, 6})},
        "attention_mask must be absent with cu_seqlens");
  Cache cache;
  fails({.input_ids = ids, .cu_seqlens = torch::tensor({0, 6}), .cache = &cache},
        "cache must be absent with cu_seqlens");
  cache.layers.resize(5);
  fails({.input_ids = ids, .cache = &cache}, "cache must be empty or of 2 layers, got 5 layers");
  GatedDeltaNetConfig wrong = config;
  wrong.num_heads = 0;
  EXPECT_THROW(GatedDeltaNetForCausalLM{wrong}, std::invalid_argument);
}

}  // namespace
}  // namespace gdn::testing
