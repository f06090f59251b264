#include <algorithm>
#include <cmath>

#include <ATen/ATen.h>

#include <gdn/modules/linear.h>
#include <gdn/ops/common/int8_weight.h>
#include <gdn/ops/common/linears.h>
#include <gdn/ops/common/small_batch_linear.h>

namespace gdn {
namespace {

thread_local bool skip_initialization = false;

}  // namespace

SkipInitialization::SkipInitialization() : was_on_(skip_initialization) {
  skip_initialization = true;
}

SkipInitialization::~SkipInitialization() { skip_initialization = was_on_; }

at::Tensor multiply(const at::Tensor& x, const Matrix& matrix) {
  if (!matrix.scales) {
    return x.is_cpu() ? linears(x, matrix.weight)[0] : at::linear(x, matrix.weight);
  }
  const at::Tensor rows = x.flatten(0, -2);
  at::DimVector sizes(x.sizes());
  sizes.back() = matrix.weight.size(0);
  return small_batch_linear(rows, matrix.weight, {.scales = matrix.scales}).reshape(sizes);
}

std::vector<at::Tensor> multiply(const at::Tensor& x, const std::vector<Matrix>& matrices) {
  std::vector<at::Tensor> weights, products;
  for (const Matrix& matrix : matrices) {
    if (matrix.scales) {
      products.push_back(multiply(x, matrix));
    } else {
      weights.push_back(matrix.weight);
    }
  }
  return products.empty() ? linears(x, weights) : products;
}

at::Tensor embed(const at::Tensor& ids, const Matrix& matrix, at::ScalarType dtype) {
  if (!matrix.scales) return at::embedding(matrix.weight, ids);
  const at::Tensor flat = ids.flatten();
  const at::Tensor rows =
      from_int8({matrix.weight.index_select(0, flat), matrix.scales->index_select(0, flat)}, dtype);
  at::DimVector sizes(ids.sizes());
  sizes.push_back(rows.size(1));
  return rows.view(sizes);
}

at::Tensor round_weight_to_int8(torch::nn::Module& module, int64_t scale_size) {
  at::Tensor weight = module.named_parameters(/*recurse=*/false)["weight"];
  const Int8Weight rounded = round_to_int8(weight.data(), scale_size);
  weight.set_requires_grad(false);
  weight.set_data(rounded.values);
  return module.register_buffer("scales", rounded.scales);
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
  if (!x.is_cpu()) {
    return at::linear(x, weight, bias.defined() ? std::optional<at::Tensor>(bias) : std::nullopt);
  }
  const at::Tensor y = multiply(x, matrix());
  return bias.defined() ? y + bias.to(y.scalar_type()) : y;
}

}  // namespace gdn
