// gdn::cuda in a build without CUDA.
#include <c10/util/Exception.h>

#include <gdn/ops/cuda/graph.h>
#include <gdn/ops/cuda/run.h>

namespace gdn::cuda {
namespace {

[[noreturn]] void refuse(c10::Device device) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      false, "gdn was built without CUDA kernels and cannot compute on ", device,
      ": build it with -DGDN_CUDA=ON (preset cuda), or move the tensors to the CPU");
}

}  // namespace

void run(const kernels::NormForward& /*p*/, c10::Device device) { refuse(device); }
void run(const kernels::NormBackward& /*p*/, c10::Device device) { refuse(device); }
void run(const kernels::SwigluForward& /*p*/, c10::Device device) { refuse(device); }
void run(const kernels::SwigluBackward& /*p*/, c10::Device device) { refuse(device); }
void run(const kernels::GateForward& /*p*/, c10::Device device) { refuse(device); }
void run(const kernels::GateBackward& /*p*/, c10::Device device) { refuse(device); }
void run(const kernels::CrossEntropyForward& /*p*/, c10::Device device) { refuse(device); }
void run(const kernels::CrossEntropyBackward& /*p*/, c10::Device device) { refuse(device); }
void run(const kernels::ShortConvolutionForward& /*p*/, c10::Device device) { refuse(device); }
void run(const kernels::ShortConvolutionBackward& /*p*/, c10::Device device) { refuse(device); }
std::string why_not_small_batch_linear(const kernels::SmallBatchLinear& /*p*/, c10::Device device) {
  refuse(device);
}
void run(const kernels::SmallBatchLinear& /*p*/, c10::Device device) { refuse(device); }
void run(const kernels::cuda::RecurrentGatedDeltaRule& /*p*/, c10::Device device) {
  refuse(device);
}
void run(const kernels::GatedDeltaRuleForward& /*p*/, bool /*recurrent*/, int64_t /*longest*/,
         c10::Device device) {
  refuse(device);
}
void run(const kernels::GatedDeltaRuleBackward& /*p*/, int64_t /*longest*/, c10::Device device) {
  refuse(device);
}

struct Graph::State {};
Graph::Graph(c10::Device device) { refuse(device); }
Graph::~Graph() = default;
void Graph::capture(const std::function<void()>& /*body*/) {}
void Graph::replay() {}

struct HostCopy::State {};
HostCopy::HostCopy(const at::Tensor& like) { refuse(like.device()); }
HostCopy::~HostCopy() = default;
void HostCopy::start(const at::Tensor& /*tensor*/) {}
const at::Tensor& HostCopy::wait() { return host_; }

bool compiled_in() { return false; }
std::string status() { return "not compiled in"; }
std::vector<DeviceInfo> devices() { return {}; }

}  // namespace gdn::cuda
