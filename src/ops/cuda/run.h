// Kernels on CUDA tensors: queued on torch's current stream of a device, their scratch memory from
// torch's allocator. In a build without CUDA everything here that runs something throws.
#pragma once

#include <string>
#include <vector>

#include <c10/core/Device.h>

#include <gdn/kernels/cross_entropy.h>
#include <gdn/kernels/cuda/gated_delta_rule_recurrent.h>
#include <gdn/kernels/gate.h>
#include <gdn/kernels/gated_delta_rule.h>
#include <gdn/kernels/norm.h>
#include <gdn/kernels/short_convolution.h>
#include <gdn/kernels/small_batch_linear.h>
#include <gdn/kernels/swiglu.h>

namespace gdn::cuda {

void run(const kernels::NormForward& p, c10::Device device);
void run(const kernels::NormBackward& p, c10::Device device);
void run(const kernels::SwigluForward& p, c10::Device device);
void run(const kernels::SwigluBackward& p, c10::Device device);
void run(const kernels::GateForward& p, c10::Device device);
void run(const kernels::GateBackward& p, c10::Device device);
void run(const kernels::CrossEntropyForward& p, c10::Device device);
void run(const kernels::CrossEntropyBackward& p, c10::Device device);
void run(const kernels::ShortConvolutionForward& p, c10::Device device);
void run(const kernels::ShortConvolutionBackward& p, c10::Device device);

/// Why small_batch_linear() cannot serve a request there; empty if it can.
std::string why_not_small_batch_linear(const kernels::SmallBatchLinear& p, c10::Device device);
void run(const kernels::SmallBatchLinear& p, c10::Device device);

/// `longest`: tokens of the longest sequence. Chooses the kernel and logs the choice.
void run(const kernels::GatedDeltaRuleForward& p, bool recurrent, int64_t longest,
         c10::Device device);
void run(const kernels::cuda::RecurrentGatedDeltaRule& p, c10::Device device);
void run(const kernels::GatedDeltaRuleBackward& p, int64_t longest, c10::Device device);

/// A GPU that torch sees.
struct DeviceInfo {
  std::string name;
  int major = 0, minor = 0;  // compute capability
  int multiprocessors = 0;
  int64_t bytes = 0;  // of memory
};

bool compiled_in();

/// What `gdn info` says: "not compiled in", why no GPU can be used, or the CUDA version.
std::string status();
/// Empty in a build without CUDA, without a driver and without a GPU.
std::vector<DeviceInfo> devices();

/// The kernel of the gated delta rule that serves a request.
struct ServedRequest {
  std::string request, kernel, reason;
};
/// Typical requests on a device.
std::vector<ServedRequest> served_requests(const DeviceInfo& device);

}  // namespace gdn::cuda
