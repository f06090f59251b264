// AdamW through torch's fused kernel, with weight decay on matrices only.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include <ATen/core/Tensor.h>

namespace gdn {

using NamedTensors = std::vector<std::pair<std::string, at::Tensor>>;

struct AdamWOptions {
  double beta1 = 0.9;
  double beta2 = 0.95;
  double eps = 1e-8;
  double weight_decay = 0.1;
};

/// Weight decay pulls a parameter to zero, which means something for matrices only: not for norms,
/// biases, A_log and dt_bias, which all have one dimension.
bool decays(const at::Tensor& parameter);

class AdamW {
 public:
  AdamW(const NamedTensors& parameters, const AdamWOptions& options);

  /// One step with the parameters' gradients. Parameters without a gradient stay as they are.
  void step(double lr);
  void zero_grad();

  /// Norm of all gradients together, in fp32; scales them down to `max_norm` when it is above
  /// (0: never). A norm that is not finite changes nothing.
  double clip_grad_norm(double max_norm);

  /// exp_avg.NAME, exp_avg_sq.NAME and step.NAME of every parameter, sharing memory.
  NamedTensors state() const;

 private:
  /// Parameters of one decay and dtype, which torch's fused kernels take together.
  struct Group {
    std::vector<std::string> names;
    std::vector<at::Tensor> parameters, exp_avgs, exp_avg_sqs, steps;
    double weight_decay = 0;
  };
  Group& group_of(const at::Tensor& parameter);

  AdamWOptions options_;
  std::vector<Group> groups_;
};

}  // namespace gdn
