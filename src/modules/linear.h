// A linear layer whose random initial values can be left out.
#pragma once

#include <cstdint>

#include <torch/nn.h>

namespace gdn {

/// While one lives, this thread makes Linear layers without values: for models that load or draw
/// their weights later, on another device perhaps.
class SkipInitialization {
 public:
  SkipInitialization();
  ~SkipInitialization();
  SkipInitialization(const SkipInitialization&) = delete;
  SkipInitialization& operator=(const SkipInitialization&) = delete;

 private:
  bool was_on_;
};

struct LinearOptions {
  int64_t in_features = 0;
  int64_t out_features = 0;
  bool bias = false;
};

/// x weight^T, differentiable: [..., D] and [N, D] -> [..., N]. On the CPU by the operator
/// `linears`, which multiplies bf16 and fp16 in the way that suits the processor.
at::Tensor project(const at::Tensor& x, const at::Tensor& weight);

/// x weight^T + bias. Initial values as torch's Linear: uniform within in_features^-1/2.
class LinearImpl : public torch::nn::Cloneable<LinearImpl> {
 public:
  explicit LinearImpl(const LinearOptions& options);
  void reset() override;
  at::Tensor forward(const at::Tensor& x);  // [..., in_features] -> [..., out_features]

  LinearOptions options;
  at::Tensor weight;  // [out_features, in_features]
  at::Tensor bias;    // [out_features], undefined without bias
};
TORCH_MODULE(Linear);

}  // namespace gdn
