#include <algorithm>
#include <random>
#include <sstream>
#include <stdexcept>

#include <gdn/training/sampler.h>

namespace gdn {

Sampler::Sampler(Corpus corpus, int64_t seq_len, int64_t tokens_per_batch, uint64_t seed)
    : corpus_(std::move(corpus)),
      seq_len_(seq_len),
      tokens_per_batch_(tokens_per_batch),
      seed_(seed) {
  if (corpus_.tokens() < seq_len_) {
    throw std::invalid_argument("seq_len must be at most the training data's " +
                                std::to_string(corpus_.tokens()) + " tokens, got " +
                                std::to_string(seq_len_));
  }
  seek(0);
}

Batch Sampler::next() {
  Batch batch;
  batch.input_ids.resize(tokens_per_batch_);
  batch.cu_seqlens = {0};
  for (int64_t filled = 0; filled < tokens_per_batch_;) {
    const Window& window = windows_[window_];
    const int64_t begin = window.begin + offset_;
    const int64_t taken = std::min(window_length(window) - offset_, tokens_per_batch_ - filled);
    corpus_.copy(window.document, begin, begin + taken, batch.input_ids.data() + filled);
    filled += taken;
    batch.sequences.push_back({window.document, begin, begin + taken});
    batch.cu_seqlens.push_back(filled);

    offset_ += taken;
    if (offset_ == window_length(window)) {
      offset_ = 0;
      if (++window_ == windows_.size()) shuffle(epoch_ + 1);
    }
  }
  position_ += tokens_per_batch_;
  return batch;
}

void Sampler::seek(int64_t position) {
  position_ = position;
  const int64_t epoch = position / corpus_.tokens();
  if (epoch != epoch_) shuffle(epoch);
  offset_ = position % corpus_.tokens();
  for (window_ = 0; offset_ >= window_length(windows_[window_]); ++window_) {
    offset_ -= window_length(windows_[window_]);
  }
}

std::string Sampler::describe(const Batch& batch) const {
  constexpr size_t kNamed = 8;
  std::ostringstream text;
  for (size_t n = 0; n < std::min(batch.sequences.size(), kNamed); ++n) {
    const Batch::Sequence& sequence = batch.sequences[n];
    text << (n == 0 ? "" : ", ") << corpus_.name(sequence.document) << " tokens " << sequence.begin
         << " to " << sequence.end;
  }
  if (batch.sequences.size() > kNamed) {
    text << " and " << batch.sequences.size() - kNamed << " more";
  }
  return text.str();
}

int64_t Sampler::window_length(const Window& window) const {
  return std::min(seq_len_, corpus_.length(window.document) - window.begin);
}

void Sampler::shuffle(int64_t epoch) {
  epoch_ = epoch;
  window_ = 0;
  windows_.clear();
  for (int64_t document = 0; document < corpus_.documents(); ++document) {
    for (int64_t begin = 0; begin < corpus_.length(document); begin += seq_len_) {
      windows_.push_back({document, begin});
    }
  }
  // Not std::shuffle, whose result differs between standard libraries.
  std::seed_seq seeds{seed_, seed_ >> 32, static_cast<uint64_t>(epoch)};
  std::mt19937_64 random(seeds);
  for (size_t i = windows_.size(); i > 1; --i) std::swap(windows_[i - 1], windows_[random() % i]);
}

}  // namespace gdn
