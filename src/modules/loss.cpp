#include <ATen/ATen.h>

#include <gdn/modules/autocast.h>
#include <gdn/modules/loss.h>
#include <gdn/ops/common/cross_entropy.h>

namespace gdn {

at::Tensor next_token_targets(const at::Tensor& labels,
                              const std::optional<at::Tensor>& cu_seqlens) {
  const int64_t T = labels.size(1);
  at::Tensor targets = at::full_like(labels, kIgnoreIndex);  // [B, T]
  if (T == 0) return targets;
  targets.narrow(1, 0, T - 1).copy_(labels.narrow(1, 1, T - 1));
  if (cu_seqlens) {
    const at::Tensor ends = cu_seqlens->to(labels.device(), at::kLong);
    const at::Tensor last = ends.masked_select(ends > 0) - 1;  // an empty first sequence ends at 0
    targets.index_fill_(1, last, kIgnoreIndex);
  }
  return targets;
}

at::Tensor token_cross_entropy(const at::Tensor& logits, const at::Tensor& targets, bool fused) {
  if (fused) return cross_entropy(logits, targets);
  return at::cross_entropy_loss(logits.to(at::kFloat), targets, {}, at::Reduction::Mean,
                                kIgnoreIndex);
}

at::Tensor token_linear_cross_entropy(const at::Tensor& hidden, const at::Tensor& weight,
                                      const at::Tensor& targets) {
  const int64_t rows_per_block = hidden.is_cpu() ? 1024 : 4096;  // a GPU needs larger products
  return linear_cross_entropy(cast_for_autocast(hidden), cast_for_autocast(weight), targets,
                              kIgnoreIndex, Reduction::mean, rows_per_block);
}

}  // namespace gdn
