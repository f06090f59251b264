// The order in which training sees its data: every token once an epoch, in a shuffled order that
// depends on nothing but the seed, cut into batches of one size.
//
// Documents are cut into windows of at most seq_len tokens. An epoch is all windows in random
// order, and the epochs one after another make an endless stream that batches cut at every
// tokens_per_batch; a window that crosses a cut goes on in the next batch. Nothing is padded or
// left out.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include <gdn/training/corpus.h>

namespace gdn {

/// Packed sequences, none of which sees another.
struct Batch {
  struct Sequence {
    int64_t document;
    int64_t begin, end;  ///< tokens of the document
  };
  std::vector<int64_t> input_ids;   ///< [tokens_per_batch]
  std::vector<int64_t> cu_seqlens;  ///< [N + 1]
  std::vector<Sequence> sequences;  ///< [N]
};

class Sampler {
 public:
  /// Throws std::invalid_argument when the corpus holds fewer than seq_len tokens.
  Sampler(Corpus corpus, int64_t seq_len, int64_t tokens_per_batch, uint64_t seed);

  Batch next();

  /// Tokens given out since the beginning: all there is to resume from.
  int64_t position() const { return position_; }
  void seek(int64_t position);
  double epoch() const {
    return static_cast<double>(position_) / static_cast<double>(corpus_.tokens());
  }

  /// "a.txt tokens 0 to 512, b.txt tokens 1024 to 1536" for messages.
  std::string describe(const Batch& batch) const;

 private:
  struct Window {
    int64_t document;
    int64_t begin;
  };
  int64_t window_length(const Window& window) const;
  void shuffle(int64_t epoch);

  Corpus corpus_;
  int64_t seq_len_, tokens_per_batch_;
  uint64_t seed_;
  int64_t position_ = 0;

  std::vector<Window> windows_;  ///< in the order of epoch epoch_
  int64_t epoch_ = -1;
  size_t window_ = 0;   ///< the one in which position_ lies
  int64_t offset_ = 0;  ///< tokens of it given out
};

}  // namespace gdn
