// What cross_entropy and linear_cross_entropy share: checks, weights of rows, and the kernels.
#pragma once

#include <cstdint>
#include <string_view>

#include <ATen/core/Tensor.h>

#include <gdn/ops/common/cross_entropy.h>

namespace gdn {

/// "mean", "sum" or "none".
Reduction reduction_from(std::string_view op, std::string_view name);
std::string_view name_of(Reduction reduction);

/// Rejects a target that is not int64 [M] beside `rows` [M, ...].
void check_target_shape(std::string_view op, const at::Tensor& target, const at::Tensor& rows);

/// Rejects a target on the CPU that is neither ignore_index nor in [0, vocabulary). Elsewhere the
/// values are not waited for: the kernels give such rows a loss and gradients of NaN.
void check_target_values(std::string_view op, const at::Tensor& target, int64_t ignore_index,
                         int64_t vocabulary);

/// [M]: by how much each row's loss counts in the reduced loss (mean or sum).
at::Tensor row_weights(const at::Tensor& target, int64_t ignore_index, Reduction reduction,
                       at::ScalarType dtype);

/// Writes the losses and log(sum exp(logits)) of all rows. logits [M, vocabulary] with a contiguous
/// last dimension; target, loss and log_sum_exp [M] contiguous.
void cross_entropy_rows(const at::Tensor& logits, const at::Tensor& target, int64_t ignore_index,
                        const at::Tensor& loss, const at::Tensor& log_sum_exp);

/// Writes d_logits, which may be logits. Requirements as above.
void cross_entropy_rows_backward(const at::Tensor& logits, const at::Tensor& target,
                                 int64_t ignore_index, const at::Tensor& log_sum_exp,
                                 const at::Tensor& d_loss, const at::Tensor& d_logits);

}  // namespace gdn
