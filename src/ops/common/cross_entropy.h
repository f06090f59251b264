// Cross-entropy of next-token prediction, without intermediate tensors of the logits' size.
#pragma once

#include <cstdint>

#include <ATen/core/Tensor.h>

namespace gdn {

inline constexpr int64_t kIgnoreIndex = -100;

enum class Reduction { mean, sum, none };

/// logits [M, vocabulary] in fp32, bf16 or fp16 (fp64 for gradient checks), target [M] int64.
/// Rows whose target is ignore_index count nothing. The loss is fp32: a scalar, or [M] for none.
/// mean divides by the number of counted rows; with none counted the loss is 0 and so are its
/// gradients. A target outside [0, vocabulary) throws c10::ValueError on a CPU. On a GPU, where
/// looking would be waiting, it makes the loss and the gradient of its row NaN, and so a mean; it
/// reads nothing out of bounds and leaves no error behind.
at::Tensor cross_entropy(const at::Tensor& logits, const at::Tensor& target,
                         int64_t ignore_index = kIgnoreIndex,
                         Reduction reduction = Reduction::mean);

/// cross_entropy(hidden weight^T, target) that holds the logits of only `rows_per_block` rows at a
/// time. hidden [M, D], weight [vocabulary, D] of one dtype.
at::Tensor linear_cross_entropy(const at::Tensor& hidden, const at::Tensor& weight,
                                const at::Tensor& target, int64_t ignore_index = kIgnoreIndex,
                                Reduction reduction = Reduction::mean,
                                int64_t rows_per_block = 1024);

}  // namespace gdn
