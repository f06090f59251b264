#include <ATen/ATen.h>

#include <gdn/models/cache.h>

namespace gdn {
namespace {

template <typename Layer, typename Visitor>
void visit_tensors(Layer& layer, Visitor&& visit) {
  for (auto* tensor : {&layer.recurrent_state, &layer.conv_q, &layer.conv_k, &layer.conv_v,
                       &layer.attn_key, &layer.attn_value, &layer.attn_tokens}) {
    if (tensor->defined()) visit(*tensor);
  }
}

}  // namespace

int64_t Cache::nbytes() const {
  int64_t bytes = 0;
  for (const LayerCache& layer : layers) {
    visit_tensors(
        layer, [&](const at::Tensor& tensor) { bytes += static_cast<int64_t>(tensor.nbytes()); });
  }
  return bytes;
}

void Cache::select_rows(const at::Tensor& index) {
  for (LayerCache& layer : layers) {
    visit_tensors(layer, [&](at::Tensor& tensor) {
      tensor = tensor.index_select(0, index.to(tensor.device()));
    });
  }
}

}  // namespace gdn
