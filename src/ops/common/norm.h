// Normalisations over the last dimension: statistics in fp32, results in the input's dtype.
#pragma once

#include <optional>
#include <tuple>

#include <ATen/core/Tensor.h>

namespace gdn {

/// x * rsqrt(mean(x^2) + eps) * weight. x [..., D]; weight [D] or absent (ones), in x's dtype or
/// fp32.
at::Tensor rms_norm(const at::Tensor& x, const std::optional<at::Tensor>& weight, double eps);

/// rms_norm of x + residual, and that sum: a residual connection and the norm after it in one pass.
/// residual like x (under autocast in any dtype).
std::tuple<at::Tensor, at::Tensor> add_rms_norm(const at::Tensor& x, const at::Tensor& residual,
                                                const std::optional<at::Tensor>& weight,
                                                double eps);

/// rms_norm(x, weight, eps) * silu(gate): the output norm of GDN layers. gate like x.
at::Tensor rms_norm_gated(const at::Tensor& x, const at::Tensor& gate,
                          const std::optional<at::Tensor>& weight, double eps);

/// x * rsqrt(sum(x^2) + eps).
at::Tensor l2_norm(const at::Tensor& x, double eps = 1e-6);

}  // namespace gdn
