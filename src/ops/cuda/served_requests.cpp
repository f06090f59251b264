#include <gdn/kernels/cuda/choice.h>
#include <gdn/ops/cuda/run.h>

namespace gdn::cuda {

std::vector<ServedRequest> served_requests(const DeviceInfo& device) {
  const kernels::cuda::ComputeCapability capability = {device.major, device.minor};
  std::vector<ServedRequest> served;
  const auto add = [&](const std::string& request, const kernels::cuda::GatedDeltaRuleChoice& c) {
    served.push_back({request, c.name, c.reason});
  };
  const auto add_both = [&](const std::string& name, kernels::DType dtype, int64_t K, int64_t V) {
    alignas(16) static float memory[4];  // aligned, as tensors usually are; nothing reads it
    kernels::GatedDeltaRuleForward forward;
    forward.dtype = dtype;
    forward.K = K;
    forward.V = V;
    forward.q.data = forward.k.data = forward.v.data = forward.o.data = memory;
    add("forward " + name, choose_forward(forward, /*recurrent=*/false, capability));
    kernels::GatedDeltaRuleBackward backward;
    static_cast<kernels::GatedDeltaRuleProblem&>(backward) = forward;
    backward.segment_states = memory;
    add("backward " + name, choose_backward(backward, capability));
  };
  add_both("bf16 K=128 V=128", kernels::DType::bf16, 128, 128);
  add_both("bf16 K=256 V=512", kernels::DType::bf16, 256, 512);
  add_both("fp32 K=128 V=128", kernels::DType::f32, 128, 128);
  add("recurrent", choose_forward({}, /*recurrent=*/true, capability));
  return served;
}

}  // namespace gdn::cuda
