#include <cuda_runtime_api.h>
#include <optional>
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
#include <gdn/kernels/cuda/small_batch_linear.h>
#include <gdn/kernels/cuda/swiglu.h>
#include <gdn/ops/cuda/normalised_keys.h>
#include <gdn/ops/cuda/run.h>
#include <gdn/ops/utils/log_choice.h>

namespace gdn::cuda {
namespace {

namespace kernel = kernels::cuda;
using Kernel = kernel::GatedDeltaRuleKernel;

/// Where a kernel runs; the device is the current one meanwhile.
class Place {
 public:
  explicit Place(c10::Device device)
      : guard_(device), device_(device), stream_(c10::cuda::getCurrentCUDAStream()) {}
  Place(std::string_view op, kernels::DType dtype, c10::Device device) : Place(device) {
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
  TORCH_CHECK_VALUE(choice.kernel != Kernel::none, kGatedDeltaRule,
                    ": no CUDA kernel serves this request: ", choice.reason);
  log_choice(choice.name, choice.reason);
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

std::string why_not_small_batch_linear(const kernels::SmallBatchLinear& p, c10::Device device) {
  const Place place(device);
  int bytes = 0;
  cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device.index());
  return kernel::why_not_small_batch_linear(p, place.capability(), bytes);
}

void run(const kernels::SmallBatchLinear& p, c10::Device device) {
  const Place place(device);
  kernel::small_batch_linear(p, place.stream());
}

void run(const kernel::RecurrentGatedDeltaRule& p, c10::Device device) {
  const Place place(kGatedDeltaRule, p.dtype, device);
  accept(kernel::choose_forward(p, /*recurrent=*/true, place.capability()));
  kernel::recurrent_gated_delta_rule(p, place.stream());
}

void run(const kernels::GatedDeltaRuleForward& p, bool recurrent, int64_t longest,
         c10::Device device) {
  Place place(kGatedDeltaRule, p.dtype, device);
  const auto choice = kernel::choose_forward(p, recurrent, place.capability());
  accept(choice);
  kernels::GatedDeltaRuleForward chosen = p;
  std::optional<NormalisedKeys> keys;
  if (choice.normalise_first) {
    keys.emplace(p, device, place.stream());
    keys->replace(chosen);
  }
  switch (choice.kernel) {
    case Kernel::recurrent_forward:
      return kernel::recurrent_gated_delta_rule(chosen, place.stream());
    case Kernel::sm90_forward: {
      void* scratch = place.scratch(kernel::gated_delta_rule_forward_sm90_scratch(chosen, longest));
      return kernel::gated_delta_rule_forward_sm90(chosen, longest, scratch, place.stream());
    }
    case Kernel::sm90_wide_forward: {
      void* scratch = place.scratch(kernel::gated_delta_rule_forward_sm90_wide_scratch(chosen));
      return kernel::gated_delta_rule_forward_sm90_wide(chosen, scratch, place.stream());
    }
    default: {
      void* scratch = place.scratch(kernel::chunk_gated_delta_rule_scratch(chosen, longest));
      return kernel::chunk_gated_delta_rule(chosen, longest, scratch, place.stream());
    }
  }
}

void run(const kernels::GatedDeltaRuleBackward& p, int64_t longest, c10::Device device) {
  Place place(kGatedDeltaRule, p.dtype, device);
  const auto choice = kernel::choose_backward(p, place.capability());
  accept(choice);
  kernels::GatedDeltaRuleBackward chosen = p;
  std::optional<NormalisedKeys> keys;
  if (choice.normalise_first) {
    keys.emplace(p, device, place.stream());
    keys->replace(chosen);
  }
  switch (choice.kernel) {
    case Kernel::sm90_backward: {
      void* scratch =
          place.scratch(kernel::gated_delta_rule_backward_sm90_scratch(chosen, longest));
      kernel::gated_delta_rule_backward_sm90(chosen, longest, scratch, place.stream());
      break;
    }
    case Kernel::sm90_wide_backward: {
      void* scratch =
          place.scratch(kernel::gated_delta_rule_backward_sm90_wide_scratch(chosen, longest));
      kernel::gated_delta_rule_backward_sm90_wide(chosen, longest, scratch, place.stream());
      break;
    }
    default: {
      void* scratch =
          place.scratch(kernel::chunk_gated_delta_rule_backward_scratch(chosen, longest));
      kernel::chunk_gated_delta_rule_backward(chosen, longest, scratch, place.stream());
    }
  }
  if (choice.normalise_first) through_key_norm(p, place.stream());
}

}  // namespace gdn::cuda
