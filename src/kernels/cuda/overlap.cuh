// Kernels that start while the one queued before them still runs (programmatic dependent launch,
// compute capability 9.0 and newer; elsewhere they start after it as always).
//
// Such a kernel may read what earlier work has left alone, then calls wait_for_previous(), and only
// then touches anything else. let_next_start() comes after that: so at most two kernels of a chain
// are at work, and everything before them is done.
#pragma once

#include <cuda_runtime.h>

#include <gdn/kernels/cuda/stream.h>

namespace gdn::kernels::cuda {

__device__ __forceinline__ void wait_for_previous() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void let_next_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&value, attribute, device);
  return value;
}

/// Launches kernel(parameters); with `overlap` it may start before the work queued before is done.
/// Errors are left for check_launch().
template <typename Parameters>
void launch(void (*kernel)(Parameters), dim3 grid, int block, size_t shared_bytes, Stream stream,
            bool overlap, const Parameters& parameters) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(block));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = overlap && device_attribute(cudaDevAttrComputeCapabilityMajor) >= 9 ? 1 : 0;
  cudaLaunchKernelEx(&config, kernel, parameters);
}

}  // namespace gdn::kernels::cuda
