#include <string>

#include <ATen/ATen.h>

#include <gdn/modules/rotary.h>
#include <gdn/ops/utils/check.h>

namespace gdn {

RotaryEmbedding::RotaryEmbedding(const RotaryEmbeddingOptions& options) : options_(options) {
  if (options.head_dim <= 0 || options.head_dim % 2 != 0) {
    reject("RotaryEmbedding", "head_dim", "positive and even", std::to_string(options.head_dim));
  }
}

at::Tensor RotaryEmbedding::angles(const at::Tensor& positions) const {
  const auto fp64 = positions.options().dtype(at::kDouble);
  const at::Tensor exponents = at::arange(0, options_.head_dim, 2, fp64) / -options_.head_dim;
  const at::Tensor frequencies = at::pow(options_.base, exponents);  // [D/2]
  return (positions.to(at::kDouble).unsqueeze(-1) * frequencies).unsqueeze(2);
}

at::Tensor RotaryEmbedding::rotate(const at::Tensor& x, const at::Tensor& angles) {
  const auto compute = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const at::Tensor cos = angles.cos().to(compute), sin = angles.sin().to(compute);
  const auto halves = x.to(compute).chunk(2, -1);
  return at::cat({halves[0] * cos - halves[1] * sin, halves[1] * cos + halves[0] * sin}, -1)
      .to(x.scalar_type());
}

}  // namespace gdn
