// Where to compute, from what a user writes.
#pragma once

#include <string>

#include <c10/core/Device.h>

namespace gdn {

struct DeviceChoice {
  c10::Device device;
  /// For "auto" in a build with CUDA, one line to tell the user: what was chosen, and why. Else
  /// empty.
  std::string note;
};

/// "cpu", "cuda" (the first GPU), "cuda:N", or "auto": the first GPU where this build and this
/// machine have one, else the CPU. Throws std::invalid_argument when `name` is none of these, and
/// std::runtime_error when the GPU cannot be had: the build has no CUDA kernels, the machine no
/// usable GPU, or fewer than N + 1.
DeviceChoice choose_device(const std::string& name);

}  // namespace gdn
