#include <string>

#include <ATen/ATen.h>
#include <c10/util/StringUtil.h>

#include <gdn/kernels/cpu/cross_entropy.h>
#include <gdn/kernels/reference/cross_entropy.h>
#include <gdn/ops/common/cross_entropy_rows.h>
#include <gdn/ops/cuda/run.h>
#include <gdn/ops/utils/check.h>
#include <gdn/ops/utils/parallel.h>
#include <gdn/ops/utils/views.h>

namespace gdn {
namespace {

kernels::CrossEntropyProblem problem(const at::Tensor& logits, const at::Tensor& target,
                                     int64_t ignore_index) {
  kernels::CrossEntropyProblem p;
  p.M = logits.size(0);
  p.vocabulary = logits.size(1);
  p.ignore_index = ignore_index;
  p.dtype = kernel_dtype(logits.scalar_type());
  p.logits = const_view2(logits);
  p.target = target.const_data_ptr<int64_t>();
  p.parallel_for = torch_parallel_for;
  return p;
}

}  // namespace

Reduction reduction_from(std::string_view op, std::string_view name) {
  if (name == "mean") return Reduction::mean;
  if (name == "sum") return Reduction::sum;
  if (name == "none") return Reduction::none;
  reject(op, "reduction", "'mean', 'sum' or 'none'", c10::str("'", name, "'"));
}

std::string_view name_of(Reduction reduction) {
  switch (reduction) {
    case Reduction::mean:
      return "mean";
    case Reduction::sum:
      return "sum";
    case Reduction::none:
      return "none";
  }
  return "";
}

void check_target_shape(std::string_view op, const at::Tensor& target, const at::Tensor& rows) {
  check_shape(op, "target", target, {rows.sym_size(0)}, "[M]");
  if (target.scalar_type() != at::kLong) reject(op, "target", "Long", describe(target));
  if (target.device() != rows.device()) {
    reject(op, "target", "on " + rows.device().str(), describe(target));
  }
}

void check_target_values(std::string_view op, const at::Tensor& target, int64_t ignore_index,
                         int64_t vocabulary) {
  if (!target.is_cpu()) return;
  const at::Tensor contiguous = target.contiguous();
  const int64_t* values = contiguous.const_data_ptr<int64_t>();
  for (int64_t m = 0; m < contiguous.numel(); ++m) {
    if (values[m] == ignore_index || (values[m] >= 0 && values[m] < vocabulary)) continue;
    reject(op, c10::str("target[", m, "]"),
           c10::str("in [0, ", vocabulary, ") or ignore_index ", ignore_index),
           std::to_string(values[m]));
  }
}

at::Tensor row_weights(const at::Tensor& target, int64_t ignore_index, Reduction reduction,
                       at::ScalarType dtype) {
  const at::Tensor counted = target.ne(ignore_index).to(dtype);
  return reduction == Reduction::mean ? counted / counted.sum().clamp_min(1) : counted;
}

void cross_entropy_rows(const at::Tensor& logits, const at::Tensor& target, int64_t ignore_index,
                        const at::Tensor& loss, const at::Tensor& log_sum_exp) {
  kernels::CrossEntropyForward p = {problem(logits, target, ignore_index), loss.mutable_data_ptr(),
                                    log_sum_exp.mutable_data_ptr()};
  if (logits.is_cuda()) return cuda::run(p, logits.device());
  p.dtype == kernels::DType::f64 ? kernels::reference::cross_entropy<double>(p)
                                 : kernels::cpu::cross_entropy(p);
}

void cross_entropy_rows_backward(const at::Tensor& logits, const at::Tensor& target,
                                 int64_t ignore_index, const at::Tensor& log_sum_exp,
                                 const at::Tensor& d_loss, const at::Tensor& d_logits) {
  kernels::CrossEntropyBackward p = {problem(logits, target, ignore_index),
                                     log_sum_exp.const_data_ptr(), d_loss.const_data_ptr(),
                                     mutable_view2(d_logits)};
  if (logits.is_cuda()) return cuda::run(p, logits.device());
  p.dtype == kernels::DType::f64 ? kernels::reference::cross_entropy_backward<double>(p)
                                 : kernels::cpu::cross_entropy_backward(p);
}

}  // namespace gdn
