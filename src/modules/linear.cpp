#include <cmath>

#include <ATen/ATen.h>

#include <gdn/modules/linear.h>
#include <gdn/ops/common/linears.h>

namespace gdn {
namespace {

thread_local bool skip_initialization = false;

}  // namespace

SkipInitialization::SkipInitialization() : was_on_(skip_initialization) {
  skip_initialization = true;
}

SkipInitialization::~SkipInitialization() { skip_initialization = was_on_; }

at::Tensor project(const at::Tensor& x, const at::Tensor& weight) {
  return x.is_cpu() ? linears(x, weight)[0] : at::linear(x, weight);
}

LinearImpl::LinearImpl(const LinearOptions& options) : options(options) { reset(); }

void LinearImpl::reset() {
  weight = register_parameter("weight", torch::empty({options.out_features, options.in_features}));
  if (options.bias) bias = register_parameter("bias", torch::empty({options.out_features}));
  if (skip_initialization) return;
  const double bound = 1.0 / std::sqrt(static_cast<double>(options.in_features));
  torch::nn::init::uniform_(weight, -bound, bound);
  if (options.bias) torch::nn::init::uniform_(bias, -bound, bound);
}

at::Tensor LinearImpl::forward(const at::Tensor& x) {
  const at::Tensor y = project(x, weight);
  return bias.defined() ? y + bias.to(y.scalar_type()) : y;
}

}  // namespace gdn
