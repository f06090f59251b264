#include <algorithm>
#include <string>

#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <gdn/ops/common/linears.h>
#include <gdn/ops/utils/check.h>
#include <gdn/ops/utils/matrix_product.h>
#include <gdn/ops/utils/views.h>

namespace gdn {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr std::string_view kOp = "linears";
/// Below so many rows of a weight a product costs as much as with so many.
constexpr int64_t kSmall = 64;

/// The weights of one product: a large one alone, all small ones together.
std::vector<std::vector<size_t>> products(at::TensorList weights) {
  std::vector<std::vector<size_t>> groups;
  std::vector<size_t> small;
  for (size_t i = 0; i < weights.size(); ++i) {
    if (weights[i].sym_size(0) < kSmall) {
      small.push_back(i);
    } else {
      groups.push_back({i});
    }
  }
  if (!small.empty()) groups.push_back(small);
  return groups;
}

/// The tensors of a group side by side in dimension `dim`; small ones are filled up with zeros to a
/// multiple of 8, without which their products' rows would lie across 16 bytes.
at::Tensor together(const std::vector<at::Tensor>& all, const std::vector<size_t>& group,
                    int64_t dim) {
  constexpr int64_t kAligned = 8;
  const at::Tensor& first = all[group[0]];
  if (first.sym_size(dim) >= kSmall) return first;
  std::vector<at::Tensor> chosen;
  c10::SymInt size = 0;
  for (const size_t i : group) {
    chosen.push_back(all[i]);
    size += all[i].sym_size(dim);
  }
  if (size % kAligned != 0) {
    std::vector<c10::SymInt> sizes = first.sym_sizes().vec();
    sizes[dim] = kAligned - size % kAligned;
    chosen.push_back(at::zeros_symint(sizes, first.options()));
  }
  return at::cat(chosen, dim);
}

/// The reverse: `joined` cut into parts as long in dimension `dim` as the group's weights have
/// rows.
void take_apart(const at::Tensor& joined, const std::vector<at::Tensor>& weights,
                const std::vector<size_t>& group, int64_t dim, std::vector<at::Tensor>& parts) {
  if (weights[group[0]].sym_size(0) >= kSmall) {
    parts[group[0]] = joined;
    return;
  }
  c10::SymInt begin = 0;
  for (const size_t i : group) {
    const c10::SymInt rows = weights[i].sym_size(0);
    parts[i] = joined.narrow_symint(dim, begin, rows).clone(at::MemoryFormat::Contiguous);
    begin += rows;
  }
}

std::vector<at::Tensor> composite_explicit(const at::Tensor& x, at::TensorList list) {
  check_floating(kOp, "x", x);
  if (x.dim() == 0) reject(kOp, "x", "of shape [..., D]", describe(x));
  const std::vector<at::Tensor> weights = list.vec();
  for (size_t i = 0; i < weights.size(); ++i) {
    const std::string name = "weights[" + std::to_string(i) + "]";
    check_shape(kOp, name, weights[i], {-1, x.sym_size(-1)}, "[out_features, D]");
    check_like(kOp, name, weights[i], "x", x);
  }
  std::vector<at::Tensor> results(weights.size());
  for (const auto& group : products(list)) {
    take_apart(linear_product(x, together(weights, group, 0)), weights, group, -1, results);
  }
  return results;
}

class LinearsFunction : public torch::autograd::Function<LinearsFunction> {
 public:
  static variable_list forward(AutogradContext* ctx, const at::Tensor& x, at::TensorList weights) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    variable_list saved = {x};
    saved.insert(saved.end(), weights.begin(), weights.end());
    ctx->save_for_backward(std::move(saved));
    ctx->set_materialize_grads(false);
    return linears(x, weights);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& d_outputs) {
    const variable_list inputs = ctx->get_saved_variables();
    const at::Tensor x = inputs[0].flatten(0, -2);
    const std::vector<at::Tensor> weights(inputs.begin() + 1, inputs.end());
    std::vector<at::Tensor> d_y(weights.size()), d_weights(weights.size());
    for (size_t i = 0; i < weights.size(); ++i) {
      d_y[i] = d_outputs[i].defined()
                   ? d_outputs[i].flatten(0, -2)
                   : at::zeros_symint({x.sym_size(0), weights[i].sym_size(0)}, x.options());
    }
    at::Tensor d_x;
    for (const auto& group : products(weights)) {
      const at::Tensor d = together(d_y, group, 1), weight = together(weights, group, 0);
      if (inputs[0].requires_grad()) {
        if (d_x.defined()) {
          add_matrix_product(d_x, d, weight);
        } else {
          d_x = matrix_product(d, weight);
        }
      }
      const bool learns = std::any_of(group.begin(), group.end(),
                                      [&](size_t i) { return weights[i].requires_grad(); });
      if (learns) take_apart(matrix_product(d.t(), x), weights, group, 0, d_weights);
    }
    variable_list gradients = {d_x.defined() ? d_x.view_symint(inputs[0].sym_sizes()) : d_x};
    gradients.insert(gradients.end(), d_weights.begin(), d_weights.end());
    return gradients;
  }
};

std::vector<at::Tensor> autograd(const at::Tensor& x, at::TensorList weights) {
  bool needed = x.requires_grad();
  for (const at::Tensor& weight : weights) needed = needed || weight.requires_grad();
  if (needed && at::GradMode::is_enabled()) return LinearsFunction::apply(x, weights);
  const at::AutoDispatchBelowADInplaceOrView guard;
  return linears(x, weights);
}

std::vector<at::Tensor> autocast(const at::Tensor& x, at::TensorList weights) {
  const c10::impl::ExcludeDispatchKeyGuard guard(c10::autocast_dispatch_keyset);
  const c10::DeviceType device = x.device().type();
  const at::ScalarType dtype = at::autocast::get_autocast_dtype(device);
  std::vector<at::Tensor> cast;
  for (const at::Tensor& weight : weights) {
    cast.push_back(at::autocast::cached_cast(dtype, weight, device));
  }
  return linears(at::autocast::cached_cast(dtype, x, device), cast);
}

}  // namespace

std::vector<at::Tensor> linears(const at::Tensor& x, at::TensorList weights) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("gdn::linears", "").typed<decltype(linears)>();
  return op.call(x, weights);
}

}  // namespace gdn

TORCH_LIBRARY_FRAGMENT(gdn, m) { m.def("linears(Tensor x, Tensor[] weights) -> Tensor[]"); }

TORCH_LIBRARY_IMPL(gdn, CompositeExplicitAutograd, m) {
  m.impl("linears", gdn::composite_explicit);
}

TORCH_LIBRARY_IMPL(gdn, Autograd, m) { m.impl("linears", gdn::autograd); }

TORCH_LIBRARY_IMPL(gdn, AutocastCPU, m) { m.impl("linears", gdn::autocast); }
TORCH_LIBRARY_IMPL(gdn, AutocastCUDA, m) { m.impl("linears", gdn::autocast); }
