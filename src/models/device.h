// Where to compute, from what a user writes.
#pragma once

#include <string>
#include <vector>

#include <c10/core/Device.h>

namespace gdn {

struct DeviceChoice {
  c10::Device device;
  /// For "auto" in a build with CUDA, one line to tell the user: what was chosen, and why. Else
  /// empty.
  std::string note;
};

/// What can be chosen.
struct Machine {
  struct Gpu {
    std::string name;
    int major = 0, minor = 0;  // compute capability
  };
  bool has_kernels = false;  // whether this build has CUDA kernels
  std::vector<Gpu> gpus;
  std::string why_none;  // why a build with CUDA kernels finds no GPU
};

/// "cpu", "cuda" (the first GPU), "cuda:N", or "auto": the first GPU where build and machine have
/// one that the kernels serve, else the CPU. Throws std::invalid_argument when `name` is none of
/// these, and std::runtime_error when the GPU cannot be had: the build has no CUDA kernels, the
/// machine no usable GPU, or fewer than N + 1, or it is older than compute capability 7.5.
DeviceChoice choose_device(const std::string& name, const Machine& machine);

/// On this machine.
DeviceChoice choose_device(const std::string& name);

}  // namespace gdn
