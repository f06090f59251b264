#include <algorithm>
#include <tuple>

#include <ATen/ATen.h>

#include <gdn/models/sampling.h>

namespace gdn {
namespace {

/// `tokens`, where the row's logits are all finite.
at::Tensor checked(const at::Tensor& tokens, const at::Tensor& least, const at::Tensor& largest) {
  return at::where(least.isfinite() & largest.isfinite(), tokens, -1);
}

}  // namespace

std::mt19937_64 row_generator(uint64_t seed, int64_t row) {
  const auto low = [](uint64_t x) { return static_cast<uint32_t>(x); };
  const auto high = [](uint64_t x) { return static_cast<uint32_t>(x >> 32); };
  const auto index = static_cast<uint64_t>(row);
  std::seed_seq sequence{low(seed), high(seed), low(index), high(index)};
  return std::mt19937_64(sequence);
}

double uniform(std::mt19937_64& generator) {
  return static_cast<double>(generator() >> 11) * 0x1.0p-53;
}

at::Tensor sample_tokens(const at::Tensor& logits, const at::Tensor& uniforms,
                         const GenerateOptions& options) {
  const at::Tensor scores = logits.to(at::kFloat);  // [B, vocab]
  const auto [least, largest] = at::aminmax(scores, 1);
  if (options.temperature == 0) return checked(scores.argmax(1), least, largest);

  // Likeliest first where tokens may be cut off; equal ones in their order.
  at::Tensor values = scores, order;
  if (options.top_k > 0 || options.top_p < 1) {
    std::tie(values, order) = scores.sort(/*stable=*/true, /*dim=*/1, /*descending=*/true);
    if (options.top_k > 0) {
      const int64_t kept = std::min(options.top_k, values.size(1));
      values = values.narrow(1, 0, kept);
    }
  }
  const int64_t last = values.size(1) - 1;
  // Probabilities times a constant, and their sums up to each token.
  const at::Tensor weights =
      ((values.to(at::kDouble) - largest.unsqueeze(1)) / options.temperature).exp();
  const at::Tensor sums = weights.cumsum(1);
  at::Tensor total = sums.select(1, last);
  at::Tensor kept_last = at::full_like(total, last, at::kLong);
  if (options.top_p < 1) {  // the fewest tokens that together have probability top_p
    const at::Tensor short_of = sums < (options.top_p * total).unsqueeze(1);
    kept_last = short_of.sum(1).clamp_max(last);  // [B]
    total = sums.gather(1, kept_last.unsqueeze(1)).squeeze(1);
  }
  const at::Tensor before = sums <= (uniforms * total).unsqueeze(1);
  const at::Tensor drawn = at::minimum(before.sum(1), kept_last);
  const at::Tensor tokens =
      order.defined() ? order.gather(1, drawn.unsqueeze(1)).squeeze(1) : drawn;
  return checked(tokens, least, largest);
}

}  // namespace gdn
