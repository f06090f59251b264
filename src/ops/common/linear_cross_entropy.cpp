#include <algorithm>
#include <string>
#include <tuple>

#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <gdn/ops/common/cross_entropy.h>
#include <gdn/ops/common/cross_entropy_rows.h>
#include <gdn/ops/utils/autograd.h>
#include <gdn/ops/utils/check.h>
#include <gdn/ops/utils/matrix_product.h>
#include <gdn/ops/utils/views.h>

namespace gdn {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// The losses of the rows, and the gradients of sum(row_weights * loss) in hidden and weight.
using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

constexpr std::string_view kOp = "linear_cross_entropy";

at::Tensor call_rows(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& target,
                     int64_t ignore_index, int64_t rows_per_block) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("gdn::linear_cross_entropy_rows", "")
                             .typed<decltype(call_rows)>();
  return op.call(hidden, weight, target, ignore_index, rows_per_block);
}

Gradients call_gradients(const at::Tensor& row_weights, const at::Tensor& hidden,
                         const at::Tensor& weight, const at::Tensor& target, int64_t ignore_index,
                         int64_t rows_per_block) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("gdn::linear_cross_entropy_gradients", "")
                             .typed<decltype(call_gradients)>();
  return op.call(row_weights, hidden, weight, target, ignore_index, rows_per_block);
}

at::Tensor call_op(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& target,
                   int64_t ignore_index, std::string_view reduction, int64_t rows_per_block) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("gdn::linear_cross_entropy", "")
                             .typed<decltype(call_op)>();
  return op.call(hidden, weight, target, ignore_index, reduction, rows_per_block);
}

void check(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& target,
           int64_t rows_per_block) {
  check_shape(kOp, "hidden", hidden, {-1, -1}, "[M, D]");
  check_floating(kOp, "hidden", hidden);
  check_shape(kOp, "weight", weight, {-1, hidden.sym_size(1)}, "[vocabulary, D]");
  check_parameter(kOp, "weight", weight, "hidden", hidden);
  check_target_shape(kOp, target, hidden);
  if (rows_per_block < 1) {
    reject(kOp, "rows_per_block", "at least 1", std::to_string(rows_per_block));
  }
}

/// Calls body(logits, target, first row, rows) for one block of rows after another. The logits are
/// the caller's to overwrite.
template <typename Body>
void for_logits(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& target,
                int64_t rows_per_block, const Body& body) {
  const at::Tensor projection = weight.to(hidden.scalar_type()).t();
  const int64_t M = hidden.size(0);
  for (int64_t begin = 0; begin < M; begin += rows_per_block) {
    const int64_t rows = std::min(rows_per_block, M - begin);
    const at::Tensor logits = matrix_product(hidden.narrow(0, begin, rows), projection);
    body(logits.contiguous(), target.narrow(0, begin, rows), begin, rows);
  }
}

at::Tensor empty_losses(const at::Tensor& hidden) {
  return at::empty_symint({hidden.sym_size(0)},
                          hidden.options().dtype(statistics_dtype(hidden.scalar_type())));
}

at::Tensor rows_meta(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& target,
                     int64_t /*ignore_index*/, int64_t rows_per_block) {
  check(hidden, weight, target, rows_per_block);
  return empty_losses(hidden);
}

at::Tensor rows(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& target,
                int64_t ignore_index, int64_t rows_per_block) {
  at::Tensor loss = rows_meta(hidden, weight, target, ignore_index, rows_per_block);
  check_target_values(kOp, target, ignore_index, weight.size(0));
  const at::Tensor log_sum_exp = at::empty_like(loss);
  for_logits(hidden, weight, target.contiguous(), rows_per_block,
             [&](const at::Tensor& logits, const at::Tensor& targets, int64_t begin, int64_t rows) {
               cross_entropy_rows(logits, targets, ignore_index, loss.narrow(0, begin, rows),
                                  log_sum_exp.narrow(0, begin, rows));
             });
  return loss;
}

Gradients gradients_meta(const at::Tensor& row_weights, const at::Tensor& hidden,
                         const at::Tensor& weight, const at::Tensor& target,
                         int64_t /*ignore_index*/, int64_t rows_per_block) {
  check(hidden, weight, target, rows_per_block);
  check_shape(kOp, "row_weights", row_weights, {hidden.sym_size(0)}, "[M]");
  return {empty_losses(hidden), at::empty_symint(hidden.sym_sizes(), hidden.options()),
          at::empty_symint(weight.sym_sizes(), weight.options())};
}

Gradients gradients(const at::Tensor& row_weights, const at::Tensor& hidden,
                    const at::Tensor& weight, const at::Tensor& target, int64_t ignore_index,
                    int64_t rows_per_block) {
  Gradients results =
      gradients_meta(row_weights, hidden, weight, target, ignore_index, rows_per_block);
  auto& [loss, d_hidden, d_weight] = results;
  check_target_values(kOp, target, ignore_index, weight.size(0));
  const at::Tensor d_loss = row_weights.to(loss.scalar_type()).contiguous();
  const at::Tensor log_sum_exp = at::empty_like(loss);
  const at::Tensor rows_weight = weight.to(hidden.scalar_type());
  at::Tensor d_weight_sum;
  for_logits(hidden, rows_weight, target.contiguous(), rows_per_block,
             [&](const at::Tensor& logits, const at::Tensor& targets, int64_t begin, int64_t rows) {
               const at::Tensor totals = log_sum_exp.narrow(0, begin, rows);
               cross_entropy_rows(logits, targets, ignore_index, loss.narrow(0, begin, rows),
                                  totals);
               cross_entropy_rows_backward(logits, targets, ignore_index, totals,
                                           d_loss.narrow(0, begin, rows), logits);
               const at::Tensor& d_logits = logits;
               at::Tensor d_rows = d_hidden.narrow(0, begin, rows);
               matrix_product_out(d_rows, d_logits, rows_weight);
               const at::Tensor block = hidden.narrow(0, begin, rows);
               if (d_weight_sum.defined()) {
                 add_matrix_product(d_weight_sum, d_logits.t(), block);
               } else {
                 d_weight_sum = matrix_product(d_logits.t(), block).to(loss.scalar_type());
               }
             });
  d_weight =
      d_weight_sum.defined() ? d_weight_sum.to(weight.scalar_type()) : at::zeros_like(weight);
  return results;
}

at::Tensor reduce(const at::Tensor& loss, const at::Tensor& target, int64_t ignore_index,
                  Reduction reduction) {
  if (reduction == Reduction::none) return loss;
  return (loss * row_weights(target, ignore_index, reduction, loss.scalar_type())).sum();
}

/// Computes the gradients together with the loss, so that the logits are computed once; they are
/// scaled when the gradient of the loss arrives.
class ReducedFunction : public torch::autograd::Function<ReducedFunction> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& hidden,
                            const at::Tensor& weight, const at::Tensor& target,
                            int64_t ignore_index, bool mean, int64_t rows_per_block) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    const at::Tensor weights =
        row_weights(target, ignore_index, mean ? Reduction::mean : Reduction::sum,
                    statistics_dtype(hidden.scalar_type()));
    auto [loss, d_hidden, d_weight] =
        call_gradients(weights, hidden, weight, target, ignore_index, rows_per_block);
    ctx->save_for_backward({d_hidden, d_weight});
    return (loss * weights).sum();
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& d_outputs) {
    const variable_list gradients = ctx->get_saved_variables();
    const auto scaled = [&](const at::Tensor& gradient) {
      return gradient * d_outputs[0].to(gradient.scalar_type());
    };
    return {scaled(gradients[0]), scaled(gradients[1]), at::Tensor(),
            at::Tensor(),         at::Tensor(),         at::Tensor()};
  }
};

/// The loss of every row: their gradients are only known in the backward, which computes the logits
/// again.
class RowsFunction : public torch::autograd::Function<RowsFunction> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& hidden,
                            const at::Tensor& weight, const at::Tensor& target,
                            int64_t ignore_index, int64_t rows_per_block) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({hidden, weight, target});
    ctx->saved_data["ignore_index"] = ignore_index;
    ctx->saved_data["rows_per_block"] = rows_per_block;
    return call_rows(hidden, weight, target, ignore_index, rows_per_block);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& d_outputs) {
    const variable_list inputs = ctx->get_saved_variables();
    auto [loss, d_hidden, d_weight] = call_gradients(d_outputs[0], inputs[0], inputs[1], inputs[2],
                                                     ctx->saved_data.at("ignore_index").toInt(),
                                                     ctx->saved_data.at("rows_per_block").toInt());
    return {d_hidden, d_weight, at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

at::Tensor composite_explicit(const at::Tensor& hidden, const at::Tensor& weight,
                              const at::Tensor& target, int64_t ignore_index,
                              std::string_view reduction, int64_t rows_per_block) {
  return reduce(call_rows(hidden, weight, target, ignore_index, rows_per_block), target,
                ignore_index, reduction_from(kOp, reduction));
}

at::Tensor autograd(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& target,
                    int64_t ignore_index, std::string_view reduction, int64_t rows_per_block) {
  if (!needs_gradient(hidden, weight)) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return call_op(hidden, weight, target, ignore_index, reduction, rows_per_block);
  }
  const Reduction kind = reduction_from(kOp, reduction);
  if (kind == Reduction::none) {
    return RowsFunction::apply(hidden, weight, target, ignore_index, rows_per_block);
  }
  return ReducedFunction::apply(hidden, weight, target, ignore_index, kind == Reduction::mean,
                                rows_per_block);
}

/// A matrix product: as under torch's own autocast in the low precision, but the weight's gradient
/// keeps the weight's dtype.
at::Tensor autocast(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& target,
                    int64_t ignore_index, std::string_view reduction, int64_t rows_per_block) {
  const c10::impl::ExcludeDispatchKeyGuard guard(c10::autocast_dispatch_keyset);
  const c10::DeviceType device = hidden.device().type();
  const at::Tensor low =
      at::autocast::cached_cast(at::autocast::get_autocast_dtype(device), hidden, device);
  return call_op(low, weight, target, ignore_index, reduction, rows_per_block);
}

}  // namespace

at::Tensor linear_cross_entropy(const at::Tensor& hidden, const at::Tensor& weight,
                                const at::Tensor& target, int64_t ignore_index, Reduction reduction,
                                int64_t rows_per_block) {
  return call_op(hidden, weight, target, ignore_index, name_of(reduction), rows_per_block);
}

}  // namespace gdn

TORCH_LIBRARY_FRAGMENT(gdn, m) {
  m.def(
      "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor target, int ignore_index=-100,"
      " str reduction='mean', int rows_per_block=1024) -> Tensor");
  m.def(
      "linear_cross_entropy_rows(Tensor hidden, Tensor weight, Tensor target, int ignore_index,"
      " int rows_per_block) -> Tensor");
  m.def(
      "linear_cross_entropy_gradients(Tensor row_weights, Tensor hidden, Tensor weight,"
      " Tensor target, int ignore_index, int rows_per_block)"
      " -> (Tensor loss, Tensor d_hidden, Tensor d_weight)");
}

TORCH_LIBRARY_IMPL(gdn, CompositeExplicitAutograd, m) {
  m.impl("linear_cross_entropy", gdn::composite_explicit);
}

TORCH_LIBRARY_IMPL(gdn, CPU, m) {
  m.impl("linear_cross_entropy_rows", gdn::rows);
  m.impl("linear_cross_entropy_gradients", gdn::gradients);
}

TORCH_LIBRARY_IMPL(gdn, CUDA, m) {
  m.impl("linear_cross_entropy_rows", gdn::rows);
  m.impl("linear_cross_entropy_gradients", gdn::gradients);
}

TORCH_LIBRARY_IMPL(gdn, Meta, m) {
  m.impl("linear_cross_entropy_rows", gdn::rows_meta);
  m.impl("linear_cross_entropy_gradients", gdn::gradients_meta);
}

TORCH_LIBRARY_IMPL(gdn, Autograd, m) {
  m.impl("linear_cross_entropy", gdn::autograd);
  // A second derivative is refused when it is asked for.
  m.impl("linear_cross_entropy_rows", torch::autograd::autogradNotImplementedFallback());
  m.impl("linear_cross_entropy_gradients", torch::autograd::autogradNotImplementedFallback());
}

TORCH_LIBRARY_IMPL(gdn, AutocastCPU, m) { m.impl("linear_cross_entropy", gdn::autocast); }
TORCH_LIBRARY_IMPL(gdn, AutocastCUDA, m) { m.impl("linear_cross_entropy", gdn::autocast); }
