// A linear map of a few rows with what stands around it in a decoding step, as one operator.
#pragma once

#include <optional>

#include <ATen/core/Tensor.h>

namespace gdn {

struct SmallBatchLinearOptions {
  /// [rows of the weight, groups of a row] fp32, with a weight of int8 on a CPU: what each number
  /// of a group is multiplied by (see int8_weight.h).
  std::optional<at::Tensor> scales = std::nullopt;
  /// [G], G a divisor of D: x is first divided by the root mean square of each G neighbours and
  /// multiplied by this.
  std::optional<at::Tensor> norm_weight = std::nullopt;
  double eps = 0;
  /// [M, D], with norm_weight: x is then multiplied by silu(gate).
  std::optional<at::Tensor> gate = std::nullopt;
  /// [M, N], added to the result.
  std::optional<at::Tensor> residual = std::nullopt;
  /// The weight has 2 N rows: y = silu(first half) * second half.
  bool swiglu = false;
  /// [C, W], 2 <= W <= 8: the first C outputs go through the short convolution with SiLU, with
  /// conv_state [M, C, W - 1] as causal_conv1d_update's state, updated in place.
  std::optional<at::Tensor> conv_weight = std::nullopt;
  std::optional<at::Tensor> conv_bias = std::nullopt;  ///< [C]
  std::optional<at::Tensor> conv_state = std::nullopt;
  /// On a GPU: the weights may be read while the work queued just before still runs. That work must
  /// not write them.
  bool overlap = false;
};

/// x [M, D], weight [N, D] (or [2 N, D]) -> y [M, N] in x's dtype, whose rows start 16 bytes apart
/// or a multiple of it. At most one of residual, swiglu and the convolution. Up to 16 rows on a
/// CPU, and up to 8 rows of bf16 or fp16 on a GPU (compute capability 8.0 and newer), take one
/// kernel, which reads the weight once and rounds only the result, on a GPU also z (see
/// kernels/small_batch_linear.h); everything else is composed of rms_norm, at::linear, swiglu and
/// causal_conv1d_update, for which weights of int8 are multiplied by their scales some rows at a
/// time. Not differentiable. Throws c10::ValueError naming the argument, what was expected and what
/// came.
at::Tensor small_batch_linear(const at::Tensor& x, const at::Tensor& weight,
                              const SmallBatchLinearOptions& options = {});

}  // namespace gdn
