#include <cmath>
#include <limits>
#include <numbers>

#include <torch/torch.h>

#include <gdn/models/causal_lm.h>
#include <gdn/training/evaluate.h>
#include <gdn/training/tokenizer.h>

#include "support.h"

namespace gdn {
namespace {

using testing::TestFolder;

class EvaluateTest : public ::testing::Test {
 protected:
  EvaluateTest() {
    torch::manual_seed(1);
    GatedDeltaNetConfig config;
    config.hidden_size = 32;
    config.num_hidden_layers = 2;
    config.num_heads = 2;
    config.head_dim = 16;
    config.vocab_size = 257;
    model = GatedDeltaNetForCausalLM(config);
    std::vector<std::string> files;
    for (const int bytes : {300, 1, 95, 700, 64}) {
      files.push_back(folder.write(std::to_string(bytes), testing::some_text(bytes, bytes)));
    }
    corpus = open_corpus(files, *make_tokenizer("byte"));
  }

  /// Each document in one forward, with torch's cross-entropy.
  double plain_loss() {
    const torch::NoGradGuard no_grad;
    model->eval();
    double sum = 0;
    int64_t count = 0;
    for (int64_t n = 0; n < corpus.documents(); ++n) {
      at::Tensor tokens = torch::empty({corpus.length(n)}, torch::kLong);
      corpus.copy(n, 0, corpus.length(n), tokens.data_ptr<int64_t>());
      CausalLMInput input;
      input.input_ids = tokens.unsqueeze(0);
      const at::Tensor logits = model->forward(input).logits[0].to(torch::kDouble);
      const int64_t predicted = corpus.length(n) - 1;
      sum += torch::nn::functional::cross_entropy(
                 logits.narrow(0, 0, predicted), tokens.narrow(0, 1, predicted),
                 torch::nn::functional::CrossEntropyFuncOptions().reduction(torch::kSum))
                 .item<double>();
      count += predicted;
    }
    return sum / static_cast<double>(count);
  }

  TestFolder folder;
  Corpus corpus;
  GatedDeltaNetForCausalLM model{nullptr};
};

TEST_F(EvaluateTest, CountsEveryTokenWhateverTheWindow) {
  const double expected = plain_loss();
  // Losses of about log(257) come from fp32 logits, of other summation orders in each window.
  const double tolerance = 32 * std::log(257) * std::numeric_limits<float>::epsilon();
  for (const int64_t window : {7, 64, 65, 100, 1000}) {
    for (const int64_t batch_size : {1, 2, 8}) {
      const EvalResult result =
          evaluate(model, corpus, {.window = window, .batch_size = batch_size});
      EXPECT_NEAR(result.loss, expected, tolerance) << window << " " << batch_size;
      EXPECT_EQ(result.tokens, corpus.tokens() - corpus.documents());
      EXPECT_EQ(result.bytes, 300 + 1 + 95 + 700 + 64);
      EXPECT_DOUBLE_EQ(result.perplexity, std::exp(result.loss));
      EXPECT_DOUBLE_EQ(result.bits_per_byte.value(),
                       result.loss * result.tokens / std::numbers::ln2 / result.bytes);
    }
  }
}

TEST_F(EvaluateTest, LeavesTheModelInItsMode) {
  model->train();
  evaluate(model, corpus);
  EXPECT_TRUE(model->is_training());
  model->eval();
  evaluate(model, corpus);
  EXPECT_FALSE(model->is_training());
}

TEST_F(EvaluateTest, TellsItsProgress) {
  std::vector<int64_t> seen;
  int64_t all = 0;
  const auto listen = [&](int64_t tokens, int64_t of) {
    seen.push_back(tokens);
    all = of;
  };
  evaluate(model, corpus, {.batch_size = 2, .on_progress = listen});
  ASSERT_EQ(seen.size(), 3U);
  EXPECT_EQ(seen.back(), all);
}

}  // namespace
}  // namespace gdn
