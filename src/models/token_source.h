// The tokens that a batch of rows goes on with, one after another.
#pragma once

#include <memory>
#include <random>
#include <vector>

#include <ATen/core/Tensor.h>

#include <gdn/models/cache.h>
#include <gdn/models/causal_lm.h>
#include <gdn/models/generate.h>

namespace gdn {

class TokenSource {
 public:
  virtual ~TokenSource() = default;
  /// The next token of each row, [B] int64 on the CPU; -1 where the logits were not finite.
  virtual const at::Tensor& next() = 0;
  /// Whether the rows that have ended should leave now, when `going_on` of `rows` go on. Until then
  /// they get tokens like the others.
  virtual bool should_shrink(int64_t rows, int64_t going_on) const = 0;
  /// Keeps the rows `index` [B'] int64.
  virtual void keep_rows(const at::Tensor& index) = 0;
};

/// Goes on from `logits` [B, vocab], those after the tokens that filled `cache`; `generators`: one
/// a row. Runs the model for at most options.max_new_tokens tokens: by a DecodeStep where the model
/// allows it, which a GPU replays, a step ahead of the caller; else by the model's forward.
std::unique_ptr<TokenSource> make_token_source(GatedDeltaNetForCausalLM& model, Cache cache,
                                               const at::Tensor& logits,
                                               const GenerateOptions& options,
                                               std::vector<std::mt19937_64> generators);

}  // namespace gdn
