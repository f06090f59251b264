#include <charconv>
#include <limits>
#include <stdexcept>
#include <vector>

#include <gdn/models/device.h>
#include <gdn/ops/cuda/run.h>

namespace gdn {
namespace {

c10::Device gpu(int64_t index) { return {c10::kCUDA, static_cast<c10::DeviceIndex>(index)}; }

/// N of "cuda:N", 0 of "cuda".
int64_t parse_index(const std::string& name) {
  constexpr int64_t kMost = std::numeric_limits<c10::DeviceIndex>::max();
  if (name == "cuda") return 0;
  int64_t index = -1;
  if (name.starts_with("cuda:")) {
    const char* end = name.data() + name.size();
    const auto [rest, error] = std::from_chars(name.data() + 5, end, index);
    if (error != std::errc() || rest != end || index > kMost) index = -1;
  }
  if (index < 0) {
    throw std::invalid_argument("device must be auto, cpu, cuda or cuda:N, got '" + name + "'");
  }
  return index;
}

/// Why the kernels cannot run on the GPU; empty if they can.
std::string why_not(const Machine::Gpu& gpu) {
  if (10 * gpu.major + gpu.minor >= 75) return {};
  return gpu.name + " has compute capability " + std::to_string(gpu.major) + "." +
         std::to_string(gpu.minor) + ", 7.5 is needed";
}

Machine this_machine() {
  Machine machine{.has_kernels = cuda::compiled_in(), .gpus = {}, .why_none = {}};
  for (const cuda::DeviceInfo& device : cuda::devices()) {
    machine.gpus.push_back({device.name, device.major, device.minor});
  }
  if (machine.gpus.empty()) machine.why_none = cuda::status();
  return machine;
}

}  // namespace

DeviceChoice choose_device(const std::string& name, const Machine& machine) {
  if (name == "cpu") return {c10::kCPU, {}};
  const bool automatic = name == "auto";
  const int64_t index = automatic ? 0 : parse_index(name);
  const auto count = static_cast<int64_t>(machine.gpus.size());
  std::string problem;
  if (!machine.has_kernels) {
    if (automatic) return {c10::kCPU, {}};
    problem =
        "gdn was built without CUDA kernels (build it with the preset cuda), use --device cpu";
  } else if (count == 0) {
    problem = machine.why_none;
  } else if (index >= count) {
    problem = "this machine has " + std::to_string(count) +
              (count == 1 ? " GPU, cuda:0" : " GPUs, cuda:0 to cuda:" + std::to_string(count - 1));
  } else {
    problem = why_not(machine.gpus[index]);
  }
  if (!problem.empty()) {
    if (automatic) return {c10::kCPU, "computing on the CPU: " + problem};
    throw std::runtime_error("device " + name + ": " + problem);
  }
  if (!automatic) return {gpu(index), {}};
  return {gpu(index), "computing on " + gpu(index).str() + ", " + machine.gpus[index].name};
}

DeviceChoice choose_device(const std::string& name) { return choose_device(name, this_machine()); }

}  // namespace gdn
