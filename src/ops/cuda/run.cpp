#include <cuda_runtime_api.h>
#include <string_view>

#include <ATen/ATen.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <gdn/kernels/cuda/choice.h>
#include <gdn/kernels/cuda/cross_entropy.h>
#include <gdn/kernels/cuda/gate.h>
#include <gdn/kernels/cuda/gated_delta_rule.h>
#include <gdn/kernels/cuda/norm.h>
#include <gdn/kernels/cuda/short_convolution.h>
#include <gdn/kernels/cuda/swiglu.h>
#include <gdn/ops/cuda/run.h>
#include <gdn/ops/gated_delta_rule/dispatch.h>

namespace gdn::cuda {
namespace {

namespace kernel = kernels::cuda;

/// Where a kernel runs; the device is the current one meanwhile.
class Place {
 public:
  Place(std::string_view op, kernels::DType dtype, c10::Device device)
      : guard_(device), device_(device), stream_(c10::cuda::getCurrentCUDAStream()) {
    TORCH_CHECK_VALUE(dtype != kernels::DType::f64, op,
                      ": tensors on CUDA must be Float, BFloat16 or Half, got Double (fp64 is "
                      "computed on the CPU only)");
  }

  kernel::Stream stream() const { return stream_.stream(); }

  /// Memory of the stream: torch may hand it out again as soon as this object is gone, to work that
  /// is queued behind.
  void* scratch(int64_t bytes) {
    scratch_ = at::empty({bytes}, at::TensorOptions().dtype(at::kByte).device(device_));
    return scratch_.mutable_data_ptr();
  }

  kernel::ComputeCapability capability() const {
    int major = 0, minor = 0;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device_.index());
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device_.index());
    return {major, minor};
  }

 private:
  c10::cuda::CUDAGuard guard_;
  c10::Device device_;
  c10::cuda::CUDAStream stream_;
  at::Tensor scratch_;
};

constexpr std::string_view kGatedDeltaRule = "gated_delta_rule";

void accept(const kernel::GatedDeltaRuleChoice& choice) {
  TORCH_CHECK_VALUE(choice.kernel != kernel::GatedDeltaRuleKernel::none, kGatedDeltaRule,
                    ": no CUDA kernel serves this request: ", choice.reason);
  log_choice(choice.name, choice.reason);
}

/// q or k, L2-normalised, as a contiguous copy.
at::Tensor normalised(const kernels::GatedDeltaRuleForward& p, const kernels::ConstView4& x,
                      c10::Device device, kernel::Stream stream) {
  const auto dtype = p.dtype == kernels::DType::bf16 ? at::kBFloat16 : at::kHalf;
  at::Tensor y = at::empty({p.B, p.T, p.H, p.K}, at::TensorOptions().dtype(dtype).device(device));
  kernels::NormForward norm;
  norm.D = p.K;
  norm.kind = kernels::NormKind::l2;
  norm.eps = 1e-6;
  norm.dtype = p.dtype;
  // Rows of one stride: all of them where heads and tokens follow one another, else head by head.
  const bool tokens_follow = x.stride_t == p.H * x.stride_h;
  const bool all_follow = tokens_follow && (p.B == 1 || x.stride_b == p.T * x.stride_t);
  const int64_t batches = all_follow ? 1 : p.B, heads = tokens_follow ? 1 : p.H;
  norm.M = p.B * p.T * p.H / (batches * heads);
  constexpr int64_t kBytes = 2;
  for (int64_t b = 0; b < batches; ++b) {
    for (int64_t h = 0; h < heads; ++h) {
      norm.x = {static_cast<const char*>(x.data) + kBytes * (b * x.stride_b + h * x.stride_h),
                tokens_follow ? x.stride_h : x.stride_t};
      norm.y = {static_cast<char*>(y.mutable_data_ptr()) + kBytes * (b * p.T * p.H + h) * p.K,
                tokens_follow ? p.K : p.H * p.K};
      kernel::norm(norm, stream);
    }
  }
  return y;
}

}  // namespace

void run(const kernels::NormForward& p, c10::Device device) {
  const Place place("norm", p.dtype, device);
  kernel::norm(p, place.stream());
}

void run(const kernels::NormBackward& p, c10::Device device) {
  Place place("norm", p.dtype, device);
  kernel::norm_backward(p, place.scratch(kernel::norm_backward_scratch(p)), place.stream());
}

void run(const kernels::SwigluForward& p, c10::Device device) {
  const Place place("swiglu", p.dtype, device);
  kernel::swiglu(p, place.stream());
}

void run(const kernels::SwigluBackward& p, c10::Device device) {
  const Place place("swiglu", p.dtype, device);
  kernel::swiglu_backward(p, place.stream());
}

void run(const kernels::GateForward& p, c10::Device device) {
  const Place place("gated_delta_rule_gate", p.dtype, device);
  kernel::gate(p, place.stream());
}

void run(const kernels::GateBackward& p, c10::Device device) {
  Place place("gated_delta_rule_gate", p.dtype, device);
  kernel::gate_backward(p, place.scratch(kernel::gate_backward_scratch(p)), place.stream());
}

void run(const kernels::CrossEntropyForward& p, c10::Device device) {
  const Place place("cross_entropy", p.dtype, device);
  kernel::cross_entropy(p, place.stream());
}

void run(const kernels::CrossEntropyBackward& p, c10::Device device) {
  const Place place("cross_entropy", p.dtype, device);
  kernel::cross_entropy_backward(p, place.stream());
}

void run(const kernels::ShortConvolutionForward& p, c10::Device device) {
  const Place place("causal_conv1d", p.dtype, device);
  kernel::short_convolution(p, place.stream());
}

void run(const kernels::ShortConvolutionBackward& p, c10::Device device) {
  Place place("causal_conv1d", p.dtype, device);
  void* scratch = place.scratch(kernel::short_convolution_backward_scratch(p));
  kernel::short_convolution_backward(p, scratch, place.stream());
}

void run(const kernels::GatedDeltaRuleForward& p, bool recurrent, int64_t longest,
         c10::Device device) {
  Place place(kGatedDeltaRule, p.dtype, device);
  const auto choice = kernel::choose_forward(p, recurrent, place.capability());
  accept(choice);
  if (choice.kernel == kernel::GatedDeltaRuleKernel::recurrent_forward) {
    return kernel::recurrent_gated_delta_rule(p, place.stream());
  }
  if (choice.kernel == kernel::GatedDeltaRuleKernel::chunk_forward) {
    void* scratch = place.scratch(kernel::chunk_gated_delta_rule_scratch(p, longest));
    return kernel::chunk_gated_delta_rule(p, longest, scratch, place.stream());
  }
  kernels::GatedDeltaRuleForward normed = p;
  at::Tensor q, k;
  if (choice.normalise_first) {
    q = normalised(p, p.q, device, place.stream());
    k = normalised(p, p.k, device, place.stream());
    normed.qk_l2norm = false;
    normed.q = {q.const_data_ptr(), q.stride(0), q.stride(1), q.stride(2)};
    normed.k = {k.const_data_ptr(), k.stride(0), k.stride(1), k.stride(2)};
  }
  kernel::gated_delta_rule_forward_sm90(normed, place.stream());
}

void run(const kernels::GatedDeltaRuleBackward& p, int64_t longest, c10::Device device) {
  Place place(kGatedDeltaRule, p.dtype, device);
  accept(kernel::choose_backward(p, place.capability()));
  void* scratch = place.scratch(kernel::chunk_gated_delta_rule_backward_scratch(p, longest));
  kernel::chunk_gated_delta_rule_backward(p, longest, scratch, place.stream());
}

}  // namespace gdn::cuda
