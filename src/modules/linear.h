// A linear layer whose random initial values can be left out, and whose weight can be int8.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

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

/// A weight [N, D] of a model: floating-point numbers, or int8 with scales
/// (ops/common/int8_weight.h).
struct Matrix {
  at::Tensor weight;
  std::optional<at::Tensor> scales;
};

/// x [..., D] -> x weight^T [..., N], and that for several matrices; on a CPU by the operators that
/// multiply as suits dtype and processor. Weights of int8 have no gradient, and their activations
/// none.
at::Tensor multiply(const at::Tensor& x, const Matrix& matrix);
std::vector<at::Tensor> multiply(const at::Tensor& x, const std::vector<Matrix>& matrices);

/// The rows `ids` [...] of the matrix, [..., D] in `dtype`, which is the weight's unless it is
/// int8.
at::Tensor embed(const at::Tensor& ids, const Matrix& matrix, at::ScalarType dtype);

/// Rounds the parameter `weight` of a Linear or Embedding to int8 in place, for inference on a CPU;
/// returns the scales, which become the module's buffer `scales`. `scale_size`: see round_to_int8.
at::Tensor round_weight_to_int8(torch::nn::Module& module, int64_t scale_size);

struct LinearOptions {
  int64_t in_features = 0;
  int64_t out_features = 0;
  bool bias = false;
};

/// x weight^T + bias. Initial values as torch's Linear: uniform within in_features^-1/2.
class LinearImpl : public torch::nn::Cloneable<LinearImpl> {
 public:
  explicit LinearImpl(const LinearOptions& options);
  void reset() override;
  at::Tensor forward(const at::Tensor& x);  // [..., in_features] -> [..., out_features]
  Matrix matrix() const { return {weight, scales}; }

  LinearOptions options;
  at::Tensor weight;                 // [out_features, in_features]
  at::Tensor bias;                   // [out_features], undefined without bias
  std::optional<at::Tensor> scales;  // of a weight of int8
};
TORCH_MODULE(Linear);

}  // namespace gdn
