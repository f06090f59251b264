#include <cmath>

#include <ATen/ATen.h>

#include <gdn/modules/short_convolution.h>
#include <gdn/ops/common/causal_conv1d.h>

namespace gdn {

ShortConvolutionImpl::ShortConvolutionImpl(const ShortConvolutionOptions& options)
    : options(options) {
  reset();
}

void ShortConvolutionImpl::reset() {
  const int64_t W = options.kernel_size;
  const double bound = 1.0 / std::sqrt(static_cast<double>(W));  // Conv1d's: W inputs a channel
  weight = register_parameter("weight", torch::empty({options.channels, 1, W}));
  torch::nn::init::uniform_(weight, -bound, bound);
  if (options.bias) {
    bias = register_parameter("bias", torch::empty({options.channels}));
    torch::nn::init::uniform_(bias, -bound, bound);
  }
}

at::Tensor ShortConvolutionImpl::forward(const at::Tensor& x,
                                         const std::optional<at::Tensor>& cu_seqlens,
                                         at::Tensor* state) {
  const at::Tensor taps = weight.squeeze(1);  // [D, W]
  const auto offset = bias.defined() ? std::optional<at::Tensor>(bias) : std::nullopt;
  CausalConv1dOptions conv{
      .bias = offset, .activation = Activation::silu, .cu_seqlens = cu_seqlens};
  if (state == nullptr) return std::get<0>(causal_conv1d(x, taps, conv));

  if (!state->defined()) {
    const int64_t N = cu_seqlens ? cu_seqlens->numel() - 1 : x.size(0);
    *state = at::zeros({N, options.channels, options.kernel_size - 1}, x.options());
  }
  if (!cu_seqlens && !at::GradMode::is_enabled()) {
    return causal_conv1d_update(x, *state, taps, offset, Activation::silu);
  }
  conv.initial_state = *state;
  conv.output_final_state = true;
  const auto [y, final_state] = causal_conv1d(x, taps, conv);
  *state = *final_state;
  return y;
}

}  // namespace gdn
