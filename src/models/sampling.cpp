#include <algorithm>
#include <cmath>
#include <numeric>
#include <stdexcept>
#include <vector>

#include <gdn/models/sampling.h>

namespace gdn {
namespace {

/// In [0, 1) with 53 bits; the standard library's distributions differ from system to system.
double uniform(std::mt19937_64& generator) {
  return static_cast<double>(generator() >> 11) * 0x1.0p-53;
}

}  // namespace

std::mt19937_64 row_generator(uint64_t seed, int64_t row) {
  const auto low = [](uint64_t x) { return static_cast<uint32_t>(x); };
  const auto high = [](uint64_t x) { return static_cast<uint32_t>(x >> 32); };
  const auto index = static_cast<uint64_t>(row);
  std::seed_seq sequence{low(seed), high(seed), low(index), high(index)};
  return std::mt19937_64(sequence);
}

int64_t sample_token(std::span<const float> logits, const GenerateOptions& options,
                     std::mt19937_64& generator) {
  const bool finite =
      std::all_of(logits.begin(), logits.end(), [](float x) { return std::isfinite(x); });
  if (logits.empty() || !finite) throw std::runtime_error("generate: the logits are not finite");
  const auto largest = std::max_element(logits.begin(), logits.end());
  if (options.temperature == 0) return largest - logits.begin();

  std::vector<int64_t> tokens(logits.size());
  std::iota(tokens.begin(), tokens.end(), int64_t{0});
  const auto likelier = [&](int64_t a, int64_t b) {
    return logits[a] != logits[b] ? logits[a] > logits[b] : a < b;
  };
  if (options.top_k > 0 && options.top_k < static_cast<int64_t>(tokens.size())) {
    std::nth_element(tokens.begin(), tokens.begin() + (options.top_k - 1), tokens.end(), likelier);
    tokens.resize(options.top_k);
  }
  if (options.top_p < 1 || options.top_k > 0) std::sort(tokens.begin(), tokens.end(), likelier);

  std::vector<double> weights(tokens.size());  // probabilities, times a constant
  double total = 0;
  for (size_t i = 0; i < tokens.size(); ++i) {
    weights[i] =
        std::exp((static_cast<double>(logits[tokens[i]]) - *largest) / options.temperature);
    total += weights[i];
  }
  if (options.top_p < 1) {  // the fewest tokens that together have probability top_p
    double sum = 0;
    size_t count = 0;
    while (count < weights.size() && sum < options.top_p * total) sum += weights[count++];
    total = sum;
    weights.resize(count);
  }
  double remaining = uniform(generator) * total;
  size_t drawn = 0;
  while (drawn + 1 < weights.size() && remaining >= weights[drawn]) remaining -= weights[drawn++];
  return tokens[drawn];
}

}  // namespace gdn
