#include <gdn/kernels/cuda/choice.h>
#include <gdn/ops/cuda/run.h>

namespace gdn::cuda {

std::vector<ServedRequest> served_requests(const DeviceInfo& device) {
  const kernels::cuda::ComputeCapability capability = {device.major, device.minor};
  std::vector<ServedRequest> served;
  const auto add = [&](const std::string& request, const kernels::cuda::GatedDeltaRuleChoice& c) {
    served.push_back({request, c.name, c.reason});
  };
  const auto add_forward = [&](const std::string& name, kernels::DType dtype, int64_t K,
                               int64_t V) {
    alignas(16) static char memory[16];  // aligned, as tensors usually are; nothing reads it
    kernels::GatedDeltaRuleForward p;
    p.dtype = dtype;
    p.K = K;
    p.V = V;
    p.q.data = p.k.data = p.v.data = p.o.data = memory;
    add("forward " + name, choose_forward(p, /*recurrent=*/false, capability));
  };
  add_forward("bf16 K=128 V=128", kernels::DType::bf16, 128, 128);
  add_forward("bf16 K=256 V=512", kernels::DType::bf16, 256, 512);
  add_forward("fp32 K=128 V=128", kernels::DType::f32, 128, 128);
  add("recurrent", choose_forward({}, /*recurrent=*/true, capability));
  add("backward", choose_backward({}, capability));
  return served;
}

}  // namespace gdn::cuda
