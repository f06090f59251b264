// Generation: from prompts to tokens, streamed.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include <gdn/models/causal_lm.h>

namespace gdn {

struct GenerateOptions {
  int64_t max_new_tokens = 256;
  double temperature = 1.0;  ///< 0: greedy
  int64_t top_k = 0;         ///< 0: all
  double top_p = 1.0;
  uint64_t seed = 0;
  std::vector<int64_t> stop_tokens = {};  ///< a row ends with one of these, which is its last token
  int64_t prefill_chunk = 8192;           ///< prompt tokens in one forward; bounds memory
  at::ScalarType state_dtype = at::kFloat;  ///< of Cache
};

/// Called with (row, token) for each new token; returning false ends that row.
using TokenCallback = std::function<bool(int64_t row, int64_t token)>;

/// Continues every prompt and returns the new tokens of each. Prompts may differ in length (they
/// are padded on the left); a row's tokens do not depend on the other rows: each row draws from its
/// own random generator, seeded by (seed, row). Runs without gradients, in the model's device and
/// dtype. On a GPU a step is captured in a CUDA graph, unless a layer is attention, and rows that
/// have ended leave the batch when half of it has; on_token hears of a token while the GPU computes
/// the next.
std::vector<std::vector<int64_t>> generate(GatedDeltaNetForCausalLM& model,
                                           const std::vector<std::vector<int64_t>>& prompts,
                                           const GenerateOptions& options = {},
                                           const TokenCallback& on_token = {});

}  // namespace gdn
