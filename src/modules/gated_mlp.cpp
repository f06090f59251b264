#include <ATen/ATen.h>

#include <gdn/modules/autocast.h>
#include <gdn/modules/gated_mlp.h>
#include <gdn/ops/common/swiglu.h>

namespace gdn {

GatedMLPImpl::GatedMLPImpl(const GatedMLPOptions& options) : options(options) { reset(); }

void GatedMLPImpl::reset() {
  const auto linear = [](int64_t in, int64_t out) {
    return Linear(LinearOptions{.in_features = in, .out_features = out});
  };
  gate_proj = register_module("gate_proj", linear(options.hidden_size, options.intermediate_size));
  up_proj = register_module("up_proj", linear(options.hidden_size, options.intermediate_size));
  down_proj = register_module("down_proj", linear(options.intermediate_size, options.hidden_size));
}

at::Tensor GatedMLPImpl::forward(const at::Tensor& x) {
  const at::Tensor input = cast_for_autocast(x);
  const auto projected = multiply(input, std::vector{gate_proj->matrix(), up_proj->matrix()});
  const at::Tensor &gate = projected[0], &up = projected[1];
  if (options.fuse_swiglu && down_proj->scales) return down_proj(swiglu(gate, up));
  if (options.fuse_swiglu) return swiglu_linear(gate, up, down_proj->weight);
  return down_proj(at::silu(gate) * up);
}

}  // namespace gdn
