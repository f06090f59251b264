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

}  // namespace

DeviceChoice choose_device(const std::string& name) {
  if (name == "cpu") return {c10::kCPU, {}};
  const bool automatic = name == "auto";
  const int64_t index = automatic ? 0 : parse_index(name);
  if (!cuda::compiled_in()) {
    if (automatic) return {c10::kCPU, {}};
    throw std::runtime_error("device " + name +
                             ": gdn was built without CUDA kernels (build it with the preset "
                             "cuda), use --device cpu");
  }
  const std::vector<cuda::DeviceInfo> devices = cuda::devices();
  if (devices.empty()) {
    const std::string status = cuda::status();
    const std::string why = status.starts_with("no GPU") ? status : "no GPU can be used";
    if (automatic) return {c10::kCPU, "computing on the CPU: " + why};
    throw std::runtime_error("device " + name + ": " + why);
  }
  const auto count = static_cast<int64_t>(devices.size());
  if (index >= count) {
    throw std::runtime_error("device " + name + ": this machine has " + std::to_string(count) +
                             (count == 1 ? " GPU, cuda:0" : " GPUs, cuda:0 to cuda:") +
                             (count == 1 ? "" : std::to_string(count - 1)));
  }
  if (!automatic) return {gpu(index), {}};
  return {gpu(index), "computing on " + gpu(index).str() + ", " + devices[index].name};
}

}  // namespace gdn
