// Generation: sampling, stopping, streaming, rows that do not know of each other.
#include <gdn/models/generate.h>
#include <gdn/models/sampling.h>

#include "models/tiny_models.h"

namespace gdn::testing {
namespace {

using Tokens = std::vector<int64_t>;

Tokens prompt(int64_t length, uint64_t seed) {
  const at::Tensor ids = random_ids(tiny_config(), 1, length, seed);
  return {ids.const_data_ptr<int64_t>(), ids.const_data_ptr<int64_t>() + length};
}

/// The most likely continuation, computed without a cache.
Tokens greedy(GatedDeltaNetForCausalLM& model, Tokens tokens, int64_t count) {
  const torch::NoGradGuard no_grad;
  Tokens result;
  for (int64_t i = 0; i < count; ++i) {
    const at::Tensor ids = torch::tensor(tokens).unsqueeze(0);
    const at::Tensor last = model->forward({.input_ids = ids, .logits_to_keep = 1}).logits;
    result.push_back(last.flatten().argmax().item<int64_t>());
    tokens.push_back(result.back());
  }
  return result;
}

class Generation : public ::testing::TestWithParam<bool> {
 protected:
  GatedDeltaNetForCausalLM model_ = make_model(GetParam() ? hybrid_config() : tiny_config());
  const std::vector<Tokens> prompts_ = {prompt(3, 1), prompt(75, 2), prompt(1, 3)};
};

TEST_P(Generation, GreedyEqualsUncachedWhateverTheChunk) {
  for (const int64_t chunk : {1, 7, 100, 8192}) {
    GenerateOptions options{.max_new_tokens = 9, .temperature = 0, .prefill_chunk = chunk};
    const auto generated = generate(model_, prompts_, options);
    for (size_t row = 0; row < prompts_.size(); ++row) {
      EXPECT_EQ(generated[row], greedy(model_, prompts_[row], 9)) << row << " chunk " << chunk;
    }
  }
}

TEST_P(Generation, RowsAreIndependentAndRepeatable) {
  const GenerateOptions options{.max_new_tokens = 12, .top_k = 20, .top_p = 0.9, .seed = 5};
  const auto together = generate(model_, prompts_, options);
  EXPECT_EQ(generate(model_, prompts_, options), together);
  EXPECT_EQ(generate(model_, {prompts_[0]}, options)[0], together[0]);
  EXPECT_EQ(generate(model_, {prompts_[0], prompts_[1]}, options)[1], together[1]);
  const GenerateOptions other{.max_new_tokens = 12, .top_k = 20, .top_p = 0.9, .seed = 6};
  EXPECT_NE(generate(model_, prompts_, other), together);
  EXPECT_NE(generate(model_, {prompts_[0], prompts_[0]}, options)[1], together[0]);
  // Rows that go on when another has left the batch draw from their own generators still.
  int64_t first_row = 0;
  const auto fewer = generate(model_, prompts_, options,
                              [&](int64_t row, int64_t) { return row != 0 || ++first_row < 3; });
  EXPECT_EQ(fewer[0], Tokens(together[0].begin(), together[0].begin() + 3));
  EXPECT_EQ(fewer[1], together[1]);
  EXPECT_EQ(fewer[2], together[2]);
}

TEST_P(Generation, RowsEndAtStopTokensAndAtTheCallbacksWish) {
  const GenerateOptions free{.max_new_tokens = 12, .temperature = 0};
  const auto all = generate(model_, prompts_, free);
  GenerateOptions stopping = free;
  stopping.stop_tokens = {all[0][2], all[1][4]};
  std::vector<Tokens> streamed(3);
  const auto generated = generate(model_, prompts_, stopping, [&](int64_t row, int64_t token) {
    streamed[row].push_back(token);
    return !(row == 2 && streamed[row].size() == 2);
  });
  EXPECT_EQ(streamed, generated);
  for (size_t row = 0; row < 3; ++row) {
    Tokens expected;
    for (const int64_t token : all[row]) {
      expected.push_back(token);
      const bool stop = token == stopping.stop_tokens[0] || token == stopping.stop_tokens[1];
      if (stop || (row == 2 && expected.size() == 2)) break;
    }
    EXPECT_EQ(generated[row], expected) << row;
  }
}

INSTANTIATE_TEST_SUITE_P(Kinds, Generation, ::testing::Bool(),
                         [](const auto& info) { return info.param ? "hybrid" : "pure"; });

TEST(Generate, StatesInBf16AreThoseInFp32Rounded) {
  const torch::NoGradGuard no_grad;
  GatedDeltaNetForCausalLM model = make_model(tiny_config());
  const at::Tensor ids = random_ids(tiny_config(), 1, 80, 4);
  Cache wide, narrow;
  narrow.state_dtype = at::kBFloat16;
  const auto step = [&](Cache& cache, int64_t begin, int64_t count) {
    return model->forward({.input_ids = ids.narrow(1, begin, count), .cache = &cache}).logits;
  };
  EXPECT_TRUE(at::equal(step(narrow, 0, 78), step(wide, 0, 78)));  // chunked: one call
  for (size_t i = 0; i < wide.layers.size(); ++i) {
    EXPECT_TRUE(at::equal(narrow.layers[i].recurrent_state,
                          wide.layers[i].recurrent_state.to(at::kBFloat16)));
  }
  EXPECT_LT(narrow.nbytes(), wide.nbytes());
  const at::Tensor got = step(narrow, 78, 1), want = step(wide, 78, 1);
  EXPECT_FALSE(at::equal(got, want));
  gdn::test::expect_close(got, want, 0.02 * gdn::test::largest(want), "logits");
  EXPECT_EQ(narrow.layers[0].recurrent_state.scalar_type(), at::kBFloat16);
  step(narrow, 79, 1);

  GenerateOptions options{.max_new_tokens = 9, .temperature = 0, .state_dtype = at::kBFloat16};
  EXPECT_EQ(generate(model, {prompt(70, 1)}, options)[0].size(), 9U);
}

TEST(Generate, LeavesTheModelAsItWas) {
  GatedDeltaNetForCausalLM model = make_model(tiny_config(), /*training=*/true);
  generate(model, {{1, 2}}, {.max_new_tokens = 2});
  EXPECT_TRUE(model->is_training());
  for (const auto& module : model->modules()) EXPECT_TRUE(module->is_training());
  EXPECT_TRUE(generate(model, {}, {}).empty());
  EXPECT_EQ(generate(model, {{1}}, {.max_new_tokens = 0}), std::vector<Tokens>(1));
}

TEST(Generate, RejectsWhatCannotBe) {
  GatedDeltaNetForCausalLM model = make_model(tiny_config());
  const auto message = [&](const std::vector<Tokens>& prompts, const GenerateOptions& options) {
    return message_of<std::invalid_argument>([&] { generate(model, prompts, options); });
  };
  EXPECT_EQ(message({{1}}, {.max_new_tokens = -1}), "max_new_tokens must be 0 or more, got -1");
  EXPECT_EQ(message({{1}}, {.temperature = -1}),
            "temperature must be 0 or more, and finite, got -1.000000");
  EXPECT_EQ(message({{1}}, {.temperature = NAN}),
            "temperature must be 0 or more, and finite, got nan");
  EXPECT_EQ(message({{1}}, {.top_k = -1}), "top_k must be 0 or more, got -1");
  EXPECT_EQ(message({{1}}, {.top_p = 0}), "top_p must be above 0 and at most 1, got 0.000000");
  EXPECT_EQ(message({{1}}, {.prefill_chunk = 0}), "prefill_chunk must be positive, got 0");
  EXPECT_EQ(message({{1}, {}}, {}), "prompt 1 must be at least one token, got none");
  EXPECT_EQ(message({{61}}, {}), "prompt 0 must be of tokens below 61, got 61");
}

constexpr int kDraws = 40'000;

/// How often each token is drawn, of kDraws.
std::vector<int> draw(const std::vector<float>& logits, const GenerateOptions& options) {
  auto generator = row_generator(options.seed, 0);
  const at::Tensor uniforms = torch::empty({kDraws}, torch::kDouble);
  for (int i = 0; i < kDraws; ++i) uniforms[i] = uniform(generator);
  const auto vocab = static_cast<int64_t>(logits.size());
  const at::Tensor tokens =
      sample_tokens(torch::tensor(logits).expand({kDraws, vocab}), uniforms, options);
  const at::Tensor counts = torch::bincount(tokens, {}, vocab);
  return {counts.const_data_ptr<int64_t>(), counts.const_data_ptr<int64_t>() + vocab};
}

/// Within five standard deviations of a binomial law.
void expect_frequency(int count, double probability) {
  EXPECT_NEAR(count, kDraws * probability, 5 * std::sqrt(kDraws * probability * (1 - probability)));
}

TEST(Sampling, FollowsTheTemperedProbabilities) {
  const std::vector<float> logits = {0.5F, 2.0F, -1.0F, 2.0F, 1.0F};
  for (const double temperature : {0.5, 1.0, 2.0}) {
    double total = 0;
    for (const float logit : logits) total += std::exp(logit / temperature);
    const auto got = draw(logits, {.temperature = temperature});
    for (size_t i = 0; i < logits.size(); ++i) {
      expect_frequency(got[i], std::exp(logits[i] / temperature) / total);
    }
  }
}

TEST(Sampling, TopKAndTopPCutTheTail) {
  const std::vector<float> logits = {std::log(0.1F), std::log(0.4F), std::log(0.3F),
                                     std::log(0.2F)};
  const auto expect = [&](const GenerateOptions& options, const std::vector<double>& wanted) {
    const auto got = draw(logits, options);
    for (size_t i = 0; i < wanted.size(); ++i) expect_frequency(got[i], wanted[i]);
  };
  expect({.top_k = 1}, {0, 1, 0, 0});
  expect({.top_k = 2}, {0, 4 / 7.0, 3 / 7.0, 0});
  expect({.top_k = 9}, {0.1, 0.4, 0.3, 0.2});
  expect({.top_p = 0.39}, {0, 1, 0, 0});
  expect({.top_p = 0.65}, {0, 4 / 7.0, 3 / 7.0, 0});
  expect({.top_p = 0.85}, {0, 4 / 9.0, 3 / 9.0, 2 / 9.0});
  expect({.top_k = 3, .top_p = 0.75}, {0, 4 / 7.0, 3 / 7.0, 0});
}

/// A token for one row of logits.
int64_t sample(const std::vector<float>& logits, double number, const GenerateOptions& options) {
  const at::Tensor uniforms = torch::full({1}, number, torch::kDouble);
  return sample_tokens(torch::tensor(logits).unsqueeze(0), uniforms, options).item<int64_t>();
}

TEST(Sampling, TiesGoToTheFirst) {
  const std::vector<float> tied = {1, 3, 3, 0};
  EXPECT_EQ(sample(tied, 0.9, {.temperature = 0}), 1);
  EXPECT_EQ(sample(tied, 0.9, {.top_k = 1}), 1);
  EXPECT_EQ(sample(tied, 0.9, {.top_p = 0.1}), 1);
}

TEST(Sampling, NumbersCutTheProbabilitiesInOrder) {
  const std::vector<float> logits = {std::log(0.1F), std::log(0.4F), std::log(0.3F),
                                     std::log(0.2F)};
  const auto all = [&](double number) { return sample(logits, number, {}); };
  EXPECT_EQ(all(0), 0);
  EXPECT_EQ(all(0.0999), 0);
  EXPECT_EQ(all(0.1001), 1);
  EXPECT_EQ(all(0.4999), 1);
  EXPECT_EQ(all(0.7999), 2);
  EXPECT_EQ(all(0.9999), 3);
  const auto sorted = [&](double number) { return sample(logits, number, {.top_k = 3}); };
  EXPECT_EQ(sorted(0.4443), 1);  // of 4 : 3 : 2
  EXPECT_EQ(sorted(0.4445), 2);
  EXPECT_EQ(sorted(0.7777), 2);
  EXPECT_EQ(sorted(0.7779), 3);
}

TEST(Sampling, RowsThatAreNotFiniteAreMarked) {
  for (const float bad : {NAN, INFINITY, -INFINITY}) {
    for (const double temperature : {0.0, 1.0}) {
      const at::Tensor logits = torch::tensor({{1.0F, 2.0F}, {1.0F, bad}, {bad, 2.0F}});
      const at::Tensor tokens = sample_tokens(logits, torch::full({3}, 0.99, torch::kDouble),
                                              {.temperature = temperature});
      EXPECT_TRUE(at::equal(tokens, torch::tensor({1, -1, -1}, torch::kLong))) << tokens;
    }
  }
}

TEST(Sampling, GeneratorsDifferByRowAndSeed) {
  EXPECT_EQ(row_generator(1, 2)(), row_generator(1, 2)());
  EXPECT_NE(row_generator(1, 2)(), row_generator(1, 3)());
  EXPECT_NE(row_generator(1, 2)(), row_generator(2, 2)());
  EXPECT_NE(row_generator(1, 2)(), row_generator(1 + (uint64_t{1} << 32), 2)());
}

}  // namespace
}  // namespace gdn::testing
