// What each option of a run does to it: none is accepted and then passed over.
#include <functional>

#include <gdn/training/metrics.h>
#include <gdn/training/trainer.h>

#include "support.h"

namespace gdn {
namespace {

using testing::read_file;
using testing::TestFolder;

class RunOptions : public ::testing::Test {
 protected:
  RunOptions() { options.steps = 3; }

  /// The weights after a run of `options` as changed, byte by byte.
  std::string weights(const std::function<void(TrainOptions&)>& change) {
    TrainOptions changed = options;
    changed.out = (folder / std::to_string(++runs)).string();
    change(changed);
    MetricsSink sink;
    result = train(changed, sink);
    return read_file(std::filesystem::path(changed.out) / "model.safetensors");
  }

  TestFolder folder;
  TrainOptions options = testing::small_run(folder);
  TrainResult result;
  int runs = 0;
};

TEST_F(RunOptions, ChangeTheWeights) {
  using Options = TrainOptions&;
  const std::string plain = weights([](Options) {});
  const auto expect_change = [&](const char* name, const std::function<void(Options)>& change) {
    EXPECT_NE(weights(change), plain) << name;
  };
  expect_change("steps", [](Options o) { o.steps = 2; });
  expect_change("batch_size", [](Options o) { o.batch_size = 3; });
  expect_change("seq_len", [](Options o) { o.seq_len = 48; });
  expect_change("grad_accumulation", [](Options o) { o.grad_accumulation = 2; });
  expect_change("lr", [](Options o) { o.lr = 2e-3; });
  expect_change("warmup", [](Options o) { o.warmup = 1; });
  expect_change("weight_decay", [](Options o) { o.weight_decay = 0.5; });
  expect_change("beta1", [](Options o) { o.beta1 = 0.5; });
  expect_change("beta2", [](Options o) { o.beta2 = 0.5; });
  expect_change("max_grad_norm", [](Options o) { o.max_grad_norm = 0.01; });
  expect_change("dtype", [](Options o) { o.dtype = "bf16"; });
  EXPECT_EQ(weights([](Options o) { o.activation_checkpointing = true; }), plain);

  options.warmup = 1;  // so that three steps see the cosine
  const std::string cosine = weights([](Options) {});
  EXPECT_NE(weights([](Options o) { o.min_lr_ratio = 0.9; }), cosine);
}

TEST_F(RunOptions, SeedChangesTheInitialWeights) {
  options.steps = 1;
  options.lr = 1e-30;  // leaves every weight as it was
  const std::string plain = weights([](TrainOptions&) {});
  EXPECT_EQ(weights([](TrainOptions&) {}), plain);
  EXPECT_NE(weights([](TrainOptions& o) { o.seed = 1; }), plain);
}

TEST_F(RunOptions, EvaluationTakesAsManyTokensAsAsked) {
  options.steps = 1;
  weights([](TrainOptions& o) { o.eval_tokens = 100; });
  EXPECT_EQ(result.evaluation.value().tokens, 100 - result.evaluation.value().documents);
}

/// Windows as long as seq_len: the same tokens in a step, in two forwards or in one.
TEST_F(RunOptions, AccumulatedBatchesAreOneLargerBatch) {
  struct FirstStep : MetricsSink {
    void on_step(const StepMetrics& metrics, bool) override { first = metrics; }
    StepMetrics first;
  };
  options.data = {folder.write("long.txt", testing::some_text(16 * 64 - 2, 1))};
  options.eval_data = {folder.write("held-out.txt", testing::some_text(100, 2))};
  options.steps = 1;
  const auto first_step = [&](int64_t batch_size, int64_t grad_accumulation) {
    options.out = (folder / ("batch-" + std::to_string(batch_size))).string();
    options.batch_size = batch_size;
    options.grad_accumulation = grad_accumulation;
    FirstStep sink;
    train(options, sink);
    return sink.first;
  };
  const StepMetrics one = first_step(4, 1), two = first_step(2, 2);
  EXPECT_EQ(two.tokens, one.tokens);
  // Means of 252 losses, and a norm of sums over them, in another order.
  EXPECT_NEAR(two.loss, one.loss, 1e-5 * one.loss);
  EXPECT_NEAR(two.grad_norm, one.grad_norm, 1e-5 * one.grad_norm);
}

}  // namespace
}  // namespace gdn
