#include <ATen/ATen.h>

#include <gdn/modules/norm.h>
#include <gdn/ops/common/norm.h>

namespace gdn {

RMSNormImpl::RMSNormImpl(const RMSNormOptions& options) : options(options) { reset(); }

void RMSNormImpl::reset() { weight = register_parameter("weight", torch::ones({options.size})); }

at::Tensor RMSNormImpl::forward(const at::Tensor& x) {
  if (options.fused) return rms_norm(x, weight, options.eps);
  return at::rms_norm(x, {options.size}, weight.to(x.scalar_type()), options.eps);
}

std::tuple<at::Tensor, at::Tensor> RMSNormImpl::prenorm(const at::Tensor& x,
                                                        const at::Tensor& residual) {
  if (residual.defined() && options.fused) return add_rms_norm(x, residual, weight, options.eps);
  const at::Tensor sum = residual.defined() ? x + residual : x;
  return {forward(sum), sum};
}

FusedRMSNormGatedImpl::FusedRMSNormGatedImpl(const FusedRMSNormGatedOptions& options)
    : options(options) {
  reset();
}

void FusedRMSNormGatedImpl::reset() {
  weight = register_parameter("weight", torch::ones({options.size}));
}

at::Tensor FusedRMSNormGatedImpl::forward(const at::Tensor& x, const at::Tensor& gate) {
  return rms_norm_gated(x, gate, weight, options.eps);
}

}  // namespace gdn
