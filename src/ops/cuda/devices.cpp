#include <cuda_runtime_api.h>

#include <gdn/ops/cuda/run.h>

namespace gdn::cuda {

namespace {

/// 13.0 for 13000.
std::string version(int number) {
  return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10);
}

}  // namespace

bool compiled_in() { return true; }

std::string status() {
  int runtime = 0, driver = 0, count = 0;
  cudaRuntimeGetVersion(&runtime);
  cudaDriverGetVersion(&driver);
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaSuccess) return "CUDA " + version(runtime);
  std::string why = cudaGetErrorString(error);
  if (error == cudaErrorInsufficientDriver) {
    why = driver == 0 ? "there is no NVIDIA driver"
                      : "the NVIDIA driver serves CUDA " + version(driver) +
                            ", this build is for CUDA " + version(runtime);
  }
  return "no GPU can be used: " + why;
}

std::vector<DeviceInfo> devices() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) count = 0;
  std::vector<DeviceInfo> devices;
  for (int i = 0; i < count; ++i) {
    cudaDeviceProp properties;
    if (cudaGetDeviceProperties(&properties, i) != cudaSuccess) continue;
    devices.push_back({properties.name, properties.major, properties.minor,
                       properties.multiProcessorCount,
                       static_cast<int64_t>(properties.totalGlobalMem)});
  }
  return devices;
}

}  // namespace gdn::cuda
