#include <string>
#include <tuple>

#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <gdn/ops/common/cross_entropy.h>
#include <gdn/ops/common/cross_entropy_rows.h>
#include <gdn/ops/utils/autograd.h>
#include <gdn/ops/utils/check.h>
#include <gdn/ops/utils/views.h>

namespace gdn {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr std::string_view kOp = "cross_entropy";

std::tuple<at::Tensor, at::Tensor> call_rows(const at::Tensor& logits, const at::Tensor& target,
                                             int64_t ignore_index) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("gdn::cross_entropy_rows", "")
                             .typed<decltype(call_rows)>();
  return op.call(logits, target, ignore_index);
}

at::Tensor call_rows_backward(const at::Tensor& d_loss, const at::Tensor& logits,
                              const at::Tensor& target, const at::Tensor& log_sum_exp,
                              int64_t ignore_index) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("gdn::cross_entropy_rows_backward", "")
                             .typed<decltype(call_rows_backward)>();
  return op.call(d_loss, logits, target, log_sum_exp, ignore_index);
}

void check(const at::Tensor& logits, const at::Tensor& target) {
  check_shape(kOp, "logits", logits, {-1, -1}, "[M, vocabulary]");
  check_floating(kOp, "logits", logits);
  check_target_shape(kOp, target, logits);
}

std::tuple<at::Tensor, at::Tensor> rows_meta(const at::Tensor& logits, const at::Tensor& target,
                                             int64_t /*ignore_index*/) {
  check(logits, target);
  const auto options = logits.options().dtype(statistics_dtype(logits.scalar_type()));
  return {at::empty_symint({logits.sym_size(0)}, options),
          at::empty_symint({logits.sym_size(0)}, options)};
}

std::tuple<at::Tensor, at::Tensor> rows(const at::Tensor& logits, const at::Tensor& target,
                                        int64_t ignore_index) {
  auto results = rows_meta(logits, target, ignore_index);
  check_target_values(kOp, target, ignore_index, logits.size(1));
  cross_entropy_rows(with_contiguous_rows(logits), target.contiguous(), ignore_index,
                     std::get<0>(results), std::get<1>(results));
  return results;
}

at::Tensor rows_backward_meta(const at::Tensor& /*d_loss*/, const at::Tensor& logits,
                              const at::Tensor& target, const at::Tensor& /*log_sum_exp*/,
                              int64_t /*ignore_index*/) {
  check(logits, target);
  return at::empty_symint(logits.sym_sizes(), logits.options());
}

at::Tensor rows_backward(const at::Tensor& d_loss, const at::Tensor& logits,
                         const at::Tensor& target, const at::Tensor& log_sum_exp,
                         int64_t ignore_index) {
  at::Tensor d_logits = rows_backward_meta(d_loss, logits, target, log_sum_exp, ignore_index);
  check_target_values(kOp, target, ignore_index, logits.size(1));
  check_shape("cross_entropy_rows_backward", "d_loss", d_loss, {logits.size(0)}, "[M]");
  check_shape("cross_entropy_rows_backward", "log_sum_exp", log_sum_exp, {logits.size(0)}, "[M]");
  const at::ScalarType statistics = statistics_dtype(logits.scalar_type());
  cross_entropy_rows_backward(with_contiguous_rows(logits), target.contiguous(), ignore_index,
                              log_sum_exp.to(statistics).contiguous(),
                              d_loss.to(statistics).contiguous(), d_logits);
  return d_logits;
}

class CrossEntropyFunction : public torch::autograd::Function<CrossEntropyFunction> {
 public:
  static variable_list forward(AutogradContext* ctx, const at::Tensor& logits,
                               const at::Tensor& target, int64_t ignore_index) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    auto [loss, log_sum_exp] = call_rows(logits, target, ignore_index);
    ctx->save_for_backward({logits, target, log_sum_exp});
    ctx->saved_data["ignore_index"] = ignore_index;
    ctx->mark_non_differentiable({log_sum_exp});
    return {loss, log_sum_exp};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& d_outputs) {
    const variable_list inputs = ctx->get_saved_variables();
    return {call_rows_backward(d_outputs[0], inputs[0], inputs[1], inputs[2],
                               ctx->saved_data.at("ignore_index").toInt()),
            at::Tensor(), at::Tensor()};
  }
};

std::tuple<at::Tensor, at::Tensor> rows_autograd(const at::Tensor& logits, const at::Tensor& target,
                                                 int64_t ignore_index) {
  if (!needs_gradient(logits)) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return call_rows(logits, target, ignore_index);
  }
  const variable_list results = CrossEntropyFunction::apply(logits, target, ignore_index);
  return {results[0], results[1]};
}

at::Tensor composite(const at::Tensor& logits, const at::Tensor& target, int64_t ignore_index,
                     std::string_view reduction) {
  return cross_entropy(logits, target, ignore_index, reduction_from(kOp, reduction));
}

}  // namespace

at::Tensor cross_entropy(const at::Tensor& logits, const at::Tensor& target, int64_t ignore_index,
                         Reduction reduction) {
  check(logits, target);
  const auto [loss, log_sum_exp] = call_rows(logits, target, ignore_index);
  if (reduction == Reduction::none) return loss;
  return (loss * row_weights(target, ignore_index, reduction, loss.scalar_type())).sum();
}

}  // namespace gdn

TORCH_LIBRARY_FRAGMENT(gdn, m) {
  m.def(
      "cross_entropy(Tensor logits, Tensor target, int ignore_index=-100, str reduction='mean')"
      " -> Tensor",
      gdn::composite);
  // The loss of each row, and what the backward needs.
  m.def(
      "cross_entropy_rows(Tensor logits, Tensor target, int ignore_index)"
      " -> (Tensor loss, Tensor log_sum_exp)");
  m.def(
      "cross_entropy_rows_backward(Tensor d_loss, Tensor logits, Tensor target,"
      " Tensor log_sum_exp, int ignore_index) -> Tensor");
}

TORCH_LIBRARY_IMPL(gdn, CPU, m) {
  m.impl("cross_entropy_rows", gdn::rows);
  m.impl("cross_entropy_rows_backward", gdn::rows_backward);
}

TORCH_LIBRARY_IMPL(gdn, CUDA, m) {
  m.impl("cross_entropy_rows", gdn::rows);
  m.impl("cross_entropy_rows_backward", gdn::rows_backward);
}

TORCH_LIBRARY_IMPL(gdn, Meta, m) {
  m.impl("cross_entropy_rows", gdn::rows_meta);
  m.impl("cross_entropy_rows_backward", gdn::rows_backward_meta);
}

TORCH_LIBRARY_IMPL(gdn, Autograd, m) {
  m.impl("cross_entropy_rows", gdn::rows_autograd);
  // A second derivative is refused when it is asked for.
  m.impl("cross_entropy_rows_backward", torch::autograd::autogradNotImplementedFallback());
}
