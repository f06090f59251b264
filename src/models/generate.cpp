#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include <ATen/ATen.h>

#include <gdn/models/generate.h>
#include <gdn/models/sampling.h>
#include <gdn/models/token_source.h>

namespace gdn {
namespace {

constexpr int64_t kEnded = -1;

/// Evaluation mode for a scope.
class EvaluationScope {
 public:
  explicit EvaluationScope(torch::nn::Module& module)
      : module_(module), training_(module.is_training()) {
    module_.eval();
  }
  ~EvaluationScope() { module_.train(training_); }
  EvaluationScope(const EvaluationScope&) = delete;
  EvaluationScope& operator=(const EvaluationScope&) = delete;

 private:
  torch::nn::Module& module_;
  bool training_;
};

void check(const std::vector<std::vector<int64_t>>& prompts, const GenerateOptions& options,
           int64_t vocab_size, c10::Device device) {
  const auto require = [](bool holds, const std::string& name, const std::string& expected,
                          const std::string& got) {
    if (!holds) throw std::invalid_argument(name + " must be " + expected + ", got " + got);
  };
  const auto whole = [](int64_t value) { return std::to_string(value); };
  require(options.max_new_tokens >= 0, "max_new_tokens", "0 or more",
          whole(options.max_new_tokens));
  require(options.temperature >= 0 && std::isfinite(options.temperature), "temperature",
          "0 or more, and finite", std::to_string(options.temperature));
  require(options.top_k >= 0, "top_k", "0 or more", whole(options.top_k));
  require(options.top_p > 0 && options.top_p <= 1, "top_p", "above 0 and at most 1",
          std::to_string(options.top_p));
  require(options.state_dtype == at::kFloat ||
              (options.state_dtype == at::kBFloat16 && !device.is_cuda()),
          "state_dtype", device.is_cuda() ? "fp32 on a GPU" : "fp32 or bf16",
          c10::toString(options.state_dtype));
  require(options.prefill_chunk > 0, "prefill_chunk", "positive", whole(options.prefill_chunk));
  for (size_t row = 0; row < prompts.size(); ++row) {
    const std::string name = "prompt " + std::to_string(row);
    require(!prompts[row].empty(), name, "at least one token", "none");
    for (const int64_t token : prompts[row]) {
      require(token >= 0 && token < vocab_size, name, "of tokens below " + whole(vocab_size),
              whole(token));
    }
  }
}

/// Feeds the prompts, padded on the left, in pieces of about `chunk` tokens, and returns the logits
/// after the last token, [B, 1, vocab].
at::Tensor prefill(GatedDeltaNetForCausalLM& model,
                   const std::vector<std::vector<int64_t>>& prompts, int64_t chunk,
                   c10::Device device, Cache& cache) {
  const auto B = static_cast<int64_t>(prompts.size());
  int64_t T = 0;
  for (const auto& prompt : prompts) T = std::max(T, static_cast<int64_t>(prompt.size()));
  const at::Tensor ids = at::zeros({B, T}, at::kLong), mask = at::zeros({B, T}, at::kLong);
  for (int64_t row = 0; row < B; ++row) {
    const auto length = static_cast<int64_t>(prompts[row].size());
    std::copy(prompts[row].begin(), prompts[row].end(),
              ids.mutable_data_ptr<int64_t>() + row * T + (T - length));
    mask[row].narrow(0, T - length, length).fill_(1);
  }
  const int64_t columns = std::max<int64_t>(1, chunk / B);
  at::Tensor logits;
  for (int64_t begin = 0; begin < T; begin += columns) {
    const int64_t count = std::min(columns, T - begin);
    logits = model
                 ->forward({.input_ids = ids.narrow(1, begin, count).to(device),
                            .attention_mask = mask.narrow(1, begin, count).to(device),
                            .cache = &cache,
                            .logits_to_keep = 1})
                 .logits;
  }
  return logits;
}

}  // namespace

std::vector<std::vector<int64_t>> generate(GatedDeltaNetForCausalLM& model,
                                           const std::vector<std::vector<int64_t>>& prompts,
                                           const GenerateOptions& options,
                                           const TokenCallback& on_token) {
  const c10::Device device = model->parameters().front().device();
  check(prompts, options, model->config().vocab_size, device);
  std::vector<std::vector<int64_t>> generated(prompts.size());
  if (prompts.empty() || options.max_new_tokens == 0) return generated;

  const torch::NoGradGuard no_grad;
  const EvaluationScope evaluation(*model);
  std::vector<std::mt19937_64> generators;
  std::vector<int64_t> rows;  // the prompt that each row of the batch continues, or kEnded
  for (size_t row = 0; row < prompts.size(); ++row) {
    rows.push_back(static_cast<int64_t>(row));
    generators.push_back(row_generator(options.seed, rows.back()));
  }
  Cache cache;
  cache.state_dtype = options.state_dtype;
  const at::Tensor logits = prefill(model, prompts, options.prefill_chunk, device, cache);
  const auto source = make_token_source(model, std::move(cache), logits.select(1, 0), options,
                                        std::move(generators));
  while (true) {
    const at::Tensor& tokens = source->next();  // [B]
    std::vector<int64_t> going_on;
    for (size_t i = 0; i < rows.size(); ++i) {
      const int64_t row = rows[i];
      if (row == kEnded) continue;
      const int64_t token = tokens.const_data_ptr<int64_t>()[i];
      if (token < 0) throw std::runtime_error("generate: the logits are not finite");
      generated[row].push_back(token);
      const bool wanted = !on_token || on_token(row, token);
      const bool stops = std::count(options.stop_tokens.begin(), options.stop_tokens.end(), token);
      const bool full = static_cast<int64_t>(generated[row].size()) == options.max_new_tokens;
      if (!wanted || stops || full) {
        rows[i] = kEnded;
      } else {
        going_on.push_back(static_cast<int64_t>(i));
      }
    }
    if (going_on.empty()) return generated;
    if (source->should_shrink(static_cast<int64_t>(rows.size()),
                              static_cast<int64_t>(going_on.size()))) {
      source->keep_rows(at::tensor(going_on));
      std::vector<int64_t> remaining;
      for (const int64_t i : going_on) remaining.push_back(rows[i]);
      rows = std::move(remaining);
    }
  }
}

}  // namespace gdn
