#include <algorithm>
#include <chrono>
#include <cmath>
#include <numbers>
#include <numeric>

#include <ATen/ops/arange.h>
#include <ATen/ops/full.h>

#include <gdn/models/causal_lm.h>
#include <gdn/ops/common/cross_entropy.h>
#include <gdn/training/autocast.h>
#include <gdn/training/evaluate.h>

namespace gdn {
namespace {

/// Bounds the logits of one forward, 256 MB in fp32.
constexpr int64_t kMaxLogits = 1 << 26;

/// Sum of the losses of documents side by side. `documents` fall in length: those that have ended
/// are at the end, and leave the batch.
double loss_of(GatedDeltaNetForCausalLM& model, const Corpus& corpus,
               const std::vector<int64_t>& documents, int64_t window, c10::Device device) {
  const auto predicted = [&](int64_t row) { return corpus.length(documents[row]) - 1; };
  double sum = 0;
  Cache cache;
  auto rows = static_cast<int64_t>(documents.size());
  for (int64_t start = 0;; start += window) {
    const int64_t rows_before = rows;
    while (rows > 0 && predicted(rows - 1) <= start) --rows;
    if (rows == 0) return sum;
    if (rows < rows_before && start > 0) cache.select_rows(at::arange(rows));

    const int64_t T = std::min(window, predicted(0) - start);
    at::Tensor input_ids = at::full({rows, T}, 0, at::kLong);           // [B, T]
    at::Tensor targets = at::full({rows, T}, kIgnoreIndex, at::kLong);  // [B, T]
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t end = std::min(start + T, predicted(row));
      corpus.copy(documents[row], start, end, input_ids[row].mutable_data_ptr<int64_t>());
      corpus.copy(documents[row], start + 1, end + 1, targets[row].mutable_data_ptr<int64_t>());
    }
    CausalLMInput input;
    input.input_ids = input_ids.to(device);
    input.cache = &cache;
    const at::Tensor logits = model->forward(input).logits;  // [B, T, vocab_size]
    sum += cross_entropy(logits.flatten(0, 1), targets.flatten().to(device), kIgnoreIndex,
                         Reduction::sum)
               .item<double>();
  }
}

}  // namespace

EvalResult evaluate(GatedDeltaNetForCausalLM& model, const Corpus& corpus,
                    const EvalOptions& options) {
  const at::NoGradGuard no_grad;
  const c10::Device device = model->parameters().front().device();
  const Bf16Autocast autocast(options.bf16, device.type());
  const bool was_training = model->is_training();
  model->eval();
  const auto begin = std::chrono::steady_clock::now();

  std::vector<int64_t> order(corpus.documents());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return corpus.length(a) > corpus.length(b); });

  EvalResult result;
  result.documents = corpus.documents();
  int64_t all = 0;
  bool bytes_known = true;
  for (int64_t n = 0; n < corpus.documents(); ++n) {
    all += std::max<int64_t>(corpus.length(n) - 1, 0);
    bytes_known = bytes_known && corpus.bytes(n).has_value();
    result.bytes += corpus.bytes(n).value_or(0);
  }
  if (!bytes_known) result.bytes = 0;

  const int64_t logits_a_token = options.batch_size * model->config().vocab_size;
  const int64_t window =
      std::min(options.window, std::max<int64_t>(kMaxLogits / logits_a_token, 64));
  double sum = 0;
  for (size_t first = 0; first < order.size(); first += options.batch_size) {
    const size_t last = std::min(order.size(), first + static_cast<size_t>(options.batch_size));
    const std::vector<int64_t> documents(order.begin() + first, order.begin() + last);
    sum += loss_of(model, corpus, documents, window, device);
    for (const int64_t n : documents) result.tokens += std::max<int64_t>(corpus.length(n) - 1, 0);
    if (options.on_progress) options.on_progress(result.tokens, all);
  }

  model->train(was_training);
  result.loss = result.tokens > 0 ? sum / static_cast<double>(result.tokens) : 0;
  result.perplexity = std::exp(result.loss);
  if (result.bytes > 0) {
    result.bits_per_byte = sum / std::numbers::ln2 / static_cast<double>(result.bytes);
  }
  result.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  return result;
}

}  // namespace gdn
