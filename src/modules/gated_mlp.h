// The feed-forward block: SwiGLU.
#pragma once

#include <cstdint>

#include <torch/nn.h>

#include <gdn/modules/linear.h>

namespace gdn {

struct GatedMLPOptions {
  int64_t hidden_size = 0;
  int64_t intermediate_size = 0;
  bool fuse_swiglu = true;  ///< our operator; otherwise torch's silu and a product
};

/// down_proj(silu(gate_proj(x)) * up_proj(x)).
class GatedMLPImpl : public torch::nn::Cloneable<GatedMLPImpl> {
 public:
  explicit GatedMLPImpl(const GatedMLPOptions& options);
  void reset() override;
  at::Tensor forward(const at::Tensor& x);  // [..., hidden_size]

  GatedMLPOptions options;
  Linear gate_proj{nullptr}, up_proj{nullptr}, down_proj{nullptr};
};
TORCH_MODULE(GatedMLP);

}  // namespace gdn
