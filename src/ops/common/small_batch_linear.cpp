#include <string>

#include <ATen/ATen.h>
#include <torch/library.h>

#include <gdn/kernels/cpu/small_batch_linear.h>
#include <gdn/ops/common/causal_conv1d.h>
#include <gdn/ops/common/int8_weight.h>
#include <gdn/ops/common/norm.h>
#include <gdn/ops/common/small_batch_linear.h>
#include <gdn/ops/common/swiglu.h>
#include <gdn/ops/cuda/run.h>
#include <gdn/ops/utils/autograd.h>
#include <gdn/ops/utils/check.h>
#include <gdn/ops/utils/log_choice.h>
#include <gdn/ops/utils/matrix_product.h>
#include <gdn/ops/utils/parallel.h>
#include <gdn/ops/utils/views.h>

namespace gdn {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

constexpr std::string_view kOp = "small_batch_linear";
constexpr int64_t kRowBytes = 16;
/// Up to so many rows a weight's elements come from memory no faster than the CPU kernel uses them.
constexpr int64_t kCpuRows = 16;

/// N, the number of outputs.
c10::SymInt outputs(const at::Tensor& weight, bool swiglu) {
  return swiglu ? weight.sym_size(0) / 2 : weight.sym_size(0);
}

void check(const at::Tensor& x, const at::Tensor& weight, const SmallBatchLinearOptions& o) {
  check_floating(kOp, "x", x);
  check_shape(kOp, "x", x, {-1, -1}, "[M, D]");
  const c10::SymInt M = x.sym_size(0), D = x.sym_size(1);
  check_shape(kOp, "weight", weight, {-1, D}, "[N, D]");
  if (o.scales) {
    check_int8_weight(kOp, weight, *o.scales, x);
  } else {
    check_like(kOp, "weight", weight, "x", x);
  }
  if (o.swiglu && weight.sym_size(0) % 2 != 0) {
    reject(kOp, "weight", "of an even number of rows with swiglu", describe(weight));
  }
  const c10::SymInt N = outputs(weight, o.swiglu);
  if (o.norm_weight) {
    check_shape(kOp, "norm_weight", *o.norm_weight, {-1}, "[G]");
    check_parameter(kOp, "norm_weight", *o.norm_weight, "x", x);
    const c10::SymInt G = o.norm_weight->sym_size(0);
    if (G < 1 || D % G != 0) {
      reject(kOp, "norm_weight", "of a divisor of D elements", describe(*o.norm_weight));
    }
  }
  if (o.gate) {
    if (!o.norm_weight) reject(kOp, "gate", "absent without norm_weight", describe(*o.gate));
    check_shape(kOp, "gate", *o.gate, {M, D}, "[M, D]");
    check_like(kOp, "gate", *o.gate, "x", x);
  }
  if (o.residual) {
    check_shape(kOp, "residual", *o.residual, {M, N}, "[M, N]");
    check_like(kOp, "residual", *o.residual, "x", x);
    if (o.swiglu) reject(kOp, "residual", "absent with swiglu", describe(*o.residual));
  }
  if (!o.conv_weight) {
    if (o.conv_bias) reject(kOp, "conv_bias", "absent without conv_weight", "a tensor");
    if (o.conv_state) reject(kOp, "conv_state", "absent without conv_weight", "a tensor");
    return;
  }
  if (o.swiglu || o.residual) {
    reject(kOp, "conv_weight", "absent with swiglu or residual", describe(*o.conv_weight));
  }
  if (!o.conv_state) reject(kOp, "conv_state", "given with conv_weight", "no tensor");
  check_shape(kOp, "conv_weight", *o.conv_weight, {-1, -1}, "[C, W]");
  check_parameter(kOp, "conv_weight", *o.conv_weight, "x", x);
  const c10::SymInt C = o.conv_weight->sym_size(0), W = o.conv_weight->sym_size(1);
  if (C < 1 || C > N || W < kernels::kMinTaps || W > kernels::kMaxTaps) {
    reject(kOp, "conv_weight", "[C, W] with 1 <= C <= N and 2 <= W <= 8", describe(*o.conv_weight));
  }
  if (o.conv_bias) {
    check_shape(kOp, "conv_bias", *o.conv_bias, {C}, "[C]");
    check_parameter(kOp, "conv_bias", *o.conv_bias, "x", x);
  }
  check_shape(kOp, "conv_state", *o.conv_state, {M, C, W - 1}, "[M, C, W - 1]");
  check_like(kOp, "conv_state", *o.conv_state, "x", x);
}

/// Elements between rows of y: they start a multiple of 16 bytes apart.
c10::SymInt row_stride(const at::Tensor& x, const c10::SymInt& N) {
  const int64_t unit = kRowBytes / static_cast<int64_t>(x.element_size());
  return (N + (unit - 1)) / unit * unit;
}

at::Tensor allocate(const at::Tensor& x, const c10::SymInt& N) {
  return at::empty_symint({x.sym_size(0), row_stride(x, N)}, x.options()).narrow_symint(1, 0, N);
}

/// `y` itself where its rows are as far apart as they should be, else a copy.
at::Tensor with_row_stride(const at::Tensor& y) {
  if (y.stride(0) == row_stride(y, y.size(1))) return y;
  return allocate(y, y.size(1)).copy_(y);
}

/// What the weight multiplies.
at::Tensor normed(const at::Tensor& x, const SmallBatchLinearOptions& o) {
  if (!o.norm_weight) return x;
  const int64_t G = o.norm_weight->size(0);
  const at::Tensor groups = x.unflatten(1, {-1, G});
  return (o.gate ? rms_norm_gated(groups, o.gate->unflatten(1, {-1, G}), o.norm_weight, o.eps)
                 : rms_norm(groups, o.norm_weight, o.eps))
      .flatten(1);
}

/// As the operators for any number of rows compute it.
at::Tensor composed(const at::Tensor& x, const at::Tensor& weight,
                    const SmallBatchLinearOptions& o) {
  const at::Tensor z = normed(x, o);
  const at::Tensor products =
      o.scales ? int8_linear(z, {weight, *o.scales}) : linear_product(z, weight);
  if (o.swiglu) {
    const int64_t N = products.size(1) / 2;
    return with_row_stride(swiglu(products.narrow(1, 0, N), products.narrow(1, N, N)));
  }
  if (o.residual) return with_row_stride(products + *o.residual);
  const at::Tensor y = with_row_stride(products);
  if (o.conv_weight) {
    at::Tensor state = *o.conv_state;
    const at::Tensor inputs = y.narrow(1, 0, o.conv_weight->size(0));
    inputs.copy_(
        causal_conv1d_update(inputs, state, *o.conv_weight, o.conv_bias, Activation::silu));
  }
  return y;
}

/// The kernel's parameters, and what it cannot take of them.
struct Request {
  kernels::SmallBatchLinear p;
  std::string why_not;

  Request(const at::Tensor& x, const at::Tensor& weight, const SmallBatchLinearOptions& o,
          const at::Tensor& y) {
    p.M = x.size(0);
    p.N = y.size(1);
    p.D = x.size(1);
    p.dtype = kernel_dtype(x.scalar_type());
    p.x = rows("x", x);
    if (o.scales) {
      if (!weight.is_contiguous()) why_not = "weight is not contiguous";
      if (!o.scales->is_contiguous()) why_not = "scales is not contiguous";
      p.weight = weight.const_data_ptr();
      p.scales = o.scales->const_data_ptr<float>();
      p.scale_size = int8_scale_size(p.D, o.scales->size(1));
    } else {
      p.weight = parameter("weight", weight, x);
    }
    if (o.norm_weight) {
      p.norm_weight = parameter("norm_weight", *o.norm_weight, x);
      p.norm_size = o.norm_weight->size(0);
      p.eps = o.eps;
    }
    if (o.gate) p.gate = rows("gate", *o.gate);
    if (o.residual) p.residual = rows("residual", *o.residual);
    p.swiglu = o.swiglu;
    if (o.conv_weight) {
      p.conv_weight = parameter("conv_weight", *o.conv_weight, x);
      p.channels = o.conv_weight->size(0);
      p.taps = o.conv_weight->size(1);
      if (o.conv_bias) p.conv_bias = parameter("conv_bias", *o.conv_bias, x);
      if (!o.conv_state->is_contiguous()) why_not = "conv_state is not contiguous";
      p.conv_state = o.conv_state->mutable_data_ptr();
    }
    p.y = mutable_view2(y);
    p.overlap = o.overlap;
    p.parallel_for = torch_parallel_for;
  }

 private:
  kernels::ConstView2 rows(const char* name, const at::Tensor& tensor) {
    if (tensor.stride(1) != 1) why_not = std::string(name) + " has rows that are not contiguous";
    return const_view2(tensor);
  }
  const void* parameter(const char* name, const at::Tensor& tensor, const at::Tensor& x) {
    if (!tensor.is_contiguous()) why_not = std::string(name) + " is not contiguous";
    if (tensor.scalar_type() != x.scalar_type()) why_not = std::string(name) + " is not like x";
    return tensor.const_data_ptr();
  }
};

/// Runs the kernel on a CPU, or returns why it cannot.
std::string run_cpu_kernel(const at::Tensor& x, const at::Tensor& weight,
                           const SmallBatchLinearOptions& o, const at::Tensor& y) {
  if (x.scalar_type() == at::kDouble) return "fp64";
  if (x.size(0) > kCpuRows) return "more than " + std::to_string(kCpuRows) + " rows";
  const Request request(x, weight, o, y);
  if (!request.why_not.empty()) return request.why_not;
  log_choice("cpu::small_batch_linear", "a few rows");
  kernels::cpu::small_batch_linear(request.p);
  return {};
}

/// Runs the kernel on a GPU, or returns why it cannot.
std::string run_kernel(const at::Tensor& x, const at::Tensor& weight,
                       const SmallBatchLinearOptions& o, const at::Tensor& y) {
  const Request request(x, weight, o, y);
  std::string why_not = request.why_not;
  if (why_not.empty()) why_not = cuda::why_not_small_batch_linear(request.p, x.device());
  if (!why_not.empty()) return why_not;
  log_choice("cuda::small_batch_linear", "a few rows of 16 bits");
  cuda::run(request.p, x.device());
  return {};
}

using Signature = at::Tensor(const at::Tensor& x, const at::Tensor& weight,
                             const OptionalTensor& norm_weight, double eps,
                             const OptionalTensor& gate, const OptionalTensor& residual,
                             bool swiglu, const OptionalTensor& conv_weight,
                             const OptionalTensor& conv_bias, const OptionalTensor& conv_state,
                             bool overlap, const OptionalTensor& scales);

at::Tensor on_cpu(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& norm_weight,
                  double eps, const OptionalTensor& gate, const OptionalTensor& residual,
                  bool swiglu, const OptionalTensor& conv_weight, const OptionalTensor& conv_bias,
                  const OptionalTensor& conv_state, bool overlap, const OptionalTensor& scales) {
  const SmallBatchLinearOptions o{scales, norm_weight, eps,       gate,       residual,
                                  swiglu, conv_weight, conv_bias, conv_state, overlap};
  check(x, weight, o);
  const at::Tensor y = allocate(x, outputs(weight, swiglu));
  if (y.numel() == 0) return y;
  const std::string why_not = run_cpu_kernel(x, weight, o, y);
  if (why_not.empty()) return y;
  log_choice("small_batch_linear, composed", why_not);
  return composed(x, weight, o);
}

at::Tensor on_cuda(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& norm_weight,
                   double eps, const OptionalTensor& gate, const OptionalTensor& residual,
                   bool swiglu, const OptionalTensor& conv_weight, const OptionalTensor& conv_bias,
                   const OptionalTensor& conv_state, bool overlap, const OptionalTensor& scales) {
  const SmallBatchLinearOptions o{scales, norm_weight, eps,       gate,       residual,
                                  swiglu, conv_weight, conv_bias, conv_state, overlap};
  check(x, weight, o);
  at::Tensor y = allocate(x, outputs(weight, swiglu));
  if (y.numel() == 0) return y;
  std::string why_not = run_kernel(x, weight, o, y);
  if (why_not.empty()) return y;
  if (o.norm_weight) {  // perhaps the norm alone stands in the way
    SmallBatchLinearOptions rest = o;
    rest.norm_weight.reset();
    rest.gate.reset();
    why_not = run_kernel(normed(x, o), weight, rest, y);
    if (why_not.empty()) return y;
  }
  log_choice("small_batch_linear, composed", why_not);
  return composed(x, weight, o);
}

at::Tensor on_meta(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& norm_weight,
                   double eps, const OptionalTensor& gate, const OptionalTensor& residual,
                   bool swiglu, const OptionalTensor& conv_weight, const OptionalTensor& conv_bias,
                   const OptionalTensor& conv_state, bool overlap, const OptionalTensor& scales) {
  check(x, weight,
        {scales, norm_weight, eps, gate, residual, swiglu, conv_weight, conv_bias, conv_state,
         overlap});
  return allocate(x, outputs(weight, swiglu));
}

const auto& handle() {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("gdn::small_batch_linear", "")
                             .typed<Signature>();
  return op;
}

at::Tensor autograd(const at::Tensor& x, const at::Tensor& weight,
                    const OptionalTensor& norm_weight, double eps, const OptionalTensor& gate,
                    const OptionalTensor& residual, bool swiglu, const OptionalTensor& conv_weight,
                    const OptionalTensor& conv_bias, const OptionalTensor& conv_state, bool overlap,
                    const OptionalTensor& scales) {
  if (needs_gradient(x, weight, norm_weight, gate, residual, conv_weight, conv_bias, conv_state)) {
    reject(kOp, "every tensor", "without gradient (call it under no_grad)", "requires_grad");
  }
  const at::AutoDispatchBelowAutograd guard;  // keeps ADInplaceOrView, which counts the mutation
  return handle().call(x, weight, norm_weight, eps, gate, residual, swiglu, conv_weight, conv_bias,
                       conv_state, overlap, scales);
}

}  // namespace

at::Tensor small_batch_linear(const at::Tensor& x, const at::Tensor& weight,
                              const SmallBatchLinearOptions& o) {
  return handle().call(x, weight, o.norm_weight, o.eps, o.gate, o.residual, o.swiglu, o.conv_weight,
                       o.conv_bias, o.conv_state, o.overlap, o.scales);
}

}  // namespace gdn

TORCH_LIBRARY_FRAGMENT(gdn, m) {
  m.def(
      "small_batch_linear(Tensor x, Tensor weight, Tensor? norm_weight=None, float eps=0.0,"
      " Tensor? gate=None, Tensor? residual=None, bool swiglu=False, Tensor? conv_weight=None,"
      " Tensor? conv_bias=None, Tensor(a!)? conv_state=None, bool overlap=False,"
      " Tensor? scales=None) -> Tensor");
}

TORCH_LIBRARY_IMPL(gdn, CPU, m) { m.impl("small_batch_linear", gdn::on_cpu); }
TORCH_LIBRARY_IMPL(gdn, CUDA, m) { m.impl("small_batch_linear", gdn::on_cuda); }
TORCH_LIBRARY_IMPL(gdn, Meta, m) { m.impl("small_batch_linear", gdn::on_meta); }
TORCH_LIBRARY_IMPL(gdn, Autograd, m) { m.impl("small_batch_linear", gdn::autograd); }
