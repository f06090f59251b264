#include <ATen/ATen.h>

#include <gdn/layers/packing.h>
#include <gdn/modules/autocast.h>
#include <gdn/ops/utils/check.h>
#include <gdn/ops/utils/cu_seqlens.h>

namespace gdn {

at::Tensor checked_cu_seqlens(std::string_view op, const at::Tensor& cu_seqlens, int64_t B,
                              int64_t T) {
  return at::tensor(check_cu_seqlens(op, cu_seqlens, B, T));
}

int64_t longest_sequence(const at::Tensor& cu_seqlens) {
  return cu_seqlens.diff().max().item<int64_t>();
}

at::Tensor Unpadding::unpad(const at::Tensor& x) const {
  return x.flatten(0, 1).index_select(0, indices).unsqueeze(0);
}

at::Tensor Unpadding::repad(const at::Tensor& x) const {
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes[0] = B * T;
  sizes.erase(sizes.begin() + 1);
  return at::zeros(sizes, x.options()).index_copy(0, indices, x.squeeze(0)).unflatten(0, {B, T});
}

std::optional<Unpadding> find_padding(std::string_view op, const at::Tensor& attention_mask,
                                      int64_t B, int64_t T) {
  check_shape(op, "attention_mask", attention_mask, {B, T}, "[B, T]");
  const at::Tensor mask = attention_mask != 0;
  if (mask.all().item<bool>()) return std::nullopt;
  if ((mask.narrow(1, 0, T - 1) & ~mask.narrow(1, 1, T - 1)).any().item<bool>()) {
    reject(op, "attention_mask", "0 for padding on the left, then 1", "a 0 after a 1");
  }
  const at::Tensor lengths = mask.sum(1).to(at::kCPU);  // [B]
  return Unpadding{B, T, mask.flatten().nonzero().squeeze(1),
                   at::cat({at::zeros({1}, lengths.options()), lengths.cumsum(0)})};
}

at::Tensor mix_packed(std::string_view op, const MixerInput& input, int64_t hidden_size,
                      const PackedMixer& mixer) {
  check_shape(op, "hidden_states", input.hidden_states, {-1, -1, hidden_size},
              "[B, T, hidden_size]");
  const at::Tensor x = cast_for_autocast(input.hidden_states);
  if (input.cu_seqlens) {
    if (input.attention_mask) reject(op, "attention_mask", "absent with cu_seqlens", "both");
    return mixer(x, checked_cu_seqlens(op, *input.cu_seqlens, x.size(0), x.size(1)));
  }
  if (input.attention_mask) {
    if (const auto padding = find_padding(op, *input.attention_mask, x.size(0), x.size(1))) {
      return padding->repad(mixer(padding->unpad(x), padding->cu_seqlens));
    }
  }
  return mixer(x, std::nullopt);
}

}  // namespace gdn
