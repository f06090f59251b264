// Loss of a model on whole documents.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>

#include <gdn/training/corpus.h>

namespace gdn {

class GatedDeltaNetForCausalLM;

struct EvalResult {
  double loss = 0;        ///< mean over predicted tokens, in nats
  double perplexity = 0;  ///< exp(loss)
  /// Of all bytes, where the sizes of all texts are known.
  std::optional<double> bits_per_byte = std::nullopt;
  int64_t documents = 0;
  int64_t tokens = 0;  ///< predicted ones
  int64_t bytes = 0;   ///< 0 when unknown
  double seconds = 0;
};

struct EvalOptions {
  int64_t window = 1024;   ///< tokens of a document in one forward
  int64_t batch_size = 8;  ///< documents side by side
  bool bf16 = false;       ///< autocast
  /// Called with (predicted tokens so far, of this many).
  std::function<void(int64_t, int64_t)> on_progress = {};
};

/// Every token but the first of each document is predicted from all before it: long documents go
/// through in windows that carry the model's state, so memory does not grow with their length.
/// The model is left in the mode (training or not) in which it was.
EvalResult evaluate(GatedDeltaNetForCausalLM& model, const Corpus& corpus,
                    const EvalOptions& options = {});

}  // namespace gdn
