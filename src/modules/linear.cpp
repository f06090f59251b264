#include <cmath>

#include <ATen/ATen.h>

#include <gdn/modules/linear.h>

namespace gdn {
namespace {

thread_local bool skip_initialization = false;

}  // namespace

SkipInitialization::SkipInitialization() : was_on_(skip_initialization) {
  skip_initialization = true;
}

SkipInitialization::~SkipInitialization() { skip_initialization = was_on_; }

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
  return at::linear(x, weight, bias.defined() ? std::optional<at::Tensor>(bias) : std::nullopt);
}

}  // namespace gdn
