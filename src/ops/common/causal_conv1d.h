// Causal depthwise convolution over a few tokens, the short convolution of linear attention.
#pragma once

#include <optional>
#include <tuple>

#include <ATen/core/Tensor.h>

namespace gdn {

enum class Activation { none, silu };

struct CausalConv1dOptions {
  std::optional<at::Tensor> bias = std::nullopt;  ///< [D]
  Activation activation = Activation::none;
  /// [N, D, W - 1]: the inputs before each sequence's first token, oldest first; zeros when absent.
  std::optional<at::Tensor> initial_state = std::nullopt;
  bool output_final_state = false;
  /// [N + 1] int64 or int32: packed sequences, B is 1. No sequence sees another's tokens.
  std::optional<at::Tensor> cu_seqlens = std::nullopt;
};

/// y_t = activation(bias + sum_w weight[:, w] * x_{t - W + 1 + w}).
///
/// x [B, T, D], weight [D, W] with 2 <= W <= 8 in x's dtype or fp32. fp32, bf16 or fp16 (fp64 for
/// gradient checks), accumulated in fp32. Returns y like x and the final state [N, D, W - 1] in x's
/// dtype, or no tensor unless output_final_state. Differentiable in x, weight, bias, initial_state.
std::tuple<at::Tensor, std::optional<at::Tensor>> causal_conv1d(
    const at::Tensor& x, const at::Tensor& weight, const CausalConv1dOptions& options = {});

/// One or more further tokens of N sequences, in place on their states: x [N, T, D] (or [N, D] for
/// one token), state [N, D, W - 1]. Returns y like x. Not differentiable.
at::Tensor causal_conv1d_update(const at::Tensor& x, at::Tensor& state, const at::Tensor& weight,
                                const std::optional<at::Tensor>& bias = std::nullopt,
                                Activation activation = Activation::none);

}  // namespace gdn
