// The short causal depthwise convolution of linear attention, with SiLU.
#pragma once

#include <cstdint>
#include <optional>

#include <torch/nn.h>

namespace gdn {

struct ShortConvolutionOptions {
  int64_t channels = 0;     ///< D
  int64_t kernel_size = 4;  ///< W
  bool bias = false;
};

class ShortConvolutionImpl : public torch::nn::Cloneable<ShortConvolutionImpl> {
 public:
  explicit ShortConvolutionImpl(const ShortConvolutionOptions& options);
  void reset() override;

  /// x [B, T, D] -> [B, T, D]. With cu_seqlens [N + 1] B is 1 and sequences do not see each other.
  /// A `state` [N, D, W - 1], where given, holds the inputs before the first token (undefined:
  /// none) and then those before the next one; with gradients off it is updated in place.
  at::Tensor forward(const at::Tensor& x,
                     const std::optional<at::Tensor>& cu_seqlens = std::nullopt,
                     at::Tensor* state = nullptr);

  ShortConvolutionOptions options;
  at::Tensor weight;  // [D, 1, W], the shape of torch's grouped Conv1d
  at::Tensor bias;    // [D], undefined without bias
};
TORCH_MODULE(ShortConvolution);

}  // namespace gdn
