// Decoding after short and long contexts: time a token and bytes of cache, which should not differ.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <vector>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <gdn/models/causal_lm.h>

namespace {

constexpr int64_t kPrefillChunk = 8192, kSteps = 300;

struct Measurement {
  double median_us = 0, p90_us = 0;
  int64_t cache_bytes = 0;
};

Measurement measure(gdn::GatedDeltaNetForCausalLM& model, int64_t context) {
  const int64_t vocab = model->config().vocab_size;
  gdn::Cache cache;
  for (int64_t begin = 0; begin < context; begin += kPrefillChunk) {
    const int64_t tokens = std::min(kPrefillChunk, context - begin);
    model->forward({.input_ids = at::randint(vocab, {1, tokens}, at::kLong),
                    .cache = &cache,
                    .logits_to_keep = 1});
  }
  std::vector<double> times;
  const at::Tensor token = at::zeros({1, 1}, at::kLong);
  for (int64_t step = 0; step < kSteps; ++step) {
    const auto start = std::chrono::steady_clock::now();
    model->forward({.input_ids = token, .cache = &cache});
    times.push_back(
        std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - start)
            .count());
  }
  std::sort(times.begin(), times.end());
  return {times[kSteps / 2], times[kSteps * 9 / 10], cache.nbytes()};
}

}  // namespace

int main() {
  const at::NoGradGuard no_grad;
  gdn::GatedDeltaNetConfig config;
  config.hidden_size = 512;
  config.num_heads = 4;
  config.head_dim = 96;
  config.num_hidden_layers = 8;
  gdn::GatedDeltaNetForCausalLM model(config);
  model->eval();
  std::printf("%ld parameters, fp32, batch 1, %d threads, %ld steps each\n",
              static_cast<long>(model->parameter_count()), at::get_num_threads(),
              static_cast<long>(kSteps));
  std::printf("%10s %16s %14s %14s\n", "context", "median us/token", "p90 us/token", "cache bytes");
  for (const int64_t context : {100, 1'000, 10'000, 100'000, 100}) {
    const Measurement result = measure(model, context);
    std::printf("%10ld %16.0f %14.0f %14ld\n", static_cast<long>(context), result.median_us,
                result.p90_us, static_cast<long>(result.cache_bytes));
  }
  return 0;
}
