// The loss of next-token prediction.
#pragma once

#include <cstdint>
#include <optional>

#include <ATen/core/Tensor.h>

namespace gdn {

/// The token that each position predicts: labels [B, T] one step to the left, kIgnoreIndex after a
/// row's last token and, with cu_seqlens [N + 1], after the last token of each packed sequence.
at::Tensor next_token_targets(const at::Tensor& labels,
                              const std::optional<at::Tensor>& cu_seqlens = std::nullopt);

/// Mean cross-entropy, fp32, of logits [M, vocabulary] and targets [M]: by our operator, or else by
/// torch's.
at::Tensor token_cross_entropy(const at::Tensor& logits, const at::Tensor& targets, bool fused);

/// The same of hidden [M, D] and the projection's weight [vocabulary, D], in autocast's dtype where
/// autocast is on.
at::Tensor token_linear_cross_entropy(const at::Tensor& hidden, const at::Tensor& weight,
                                      const at::Tensor& targets);

}  // namespace gdn
