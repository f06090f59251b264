// RMS normalisation with a learned scale.
#pragma once

#include <cstdint>
#include <tuple>

#include <torch/nn.h>

namespace gdn {

struct RMSNormOptions {
  int64_t size = 0;  ///< of the last dimension
  double eps = 1e-5;
  bool fused = true;  ///< our operator; otherwise torch's at::rms_norm
};

/// x * rsqrt(mean(x^2) + eps) * weight over the last dimension.
class RMSNormImpl : public torch::nn::Cloneable<RMSNormImpl> {
 public:
  explicit RMSNormImpl(const RMSNormOptions& options);
  void reset() override;
  at::Tensor forward(const at::Tensor& x);  // [..., size]
  /// The norm of x + residual, and that sum. Without a residual (undefined) the sum is x.
  std::tuple<at::Tensor, at::Tensor> prenorm(const at::Tensor& x, const at::Tensor& residual);

  RMSNormOptions options;
  at::Tensor weight;  // [size], ones at first
};
TORCH_MODULE(RMSNorm);

struct FusedRMSNormGatedOptions {
  int64_t size = 0;
  double eps = 1e-5;
};

/// rms_norm(x) * weight * silu(gate): the output norm of Gated DeltaNet.
class FusedRMSNormGatedImpl : public torch::nn::Cloneable<FusedRMSNormGatedImpl> {
 public:
  explicit FusedRMSNormGatedImpl(const FusedRMSNormGatedOptions& options);
  void reset() override;
  at::Tensor forward(const at::Tensor& x, const at::Tensor& gate);  // both [..., size]

  FusedRMSNormGatedOptions options;
  at::Tensor weight;  // [size], ones at first
};
TORCH_MODULE(FusedRMSNormGated);

}  // namespace gdn
