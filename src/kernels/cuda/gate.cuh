// The gate of the gated delta rule, for the kernels that compute it on their way.
#pragma once

#include <cuda_runtime.h>

namespace gdn::kernels::cuda {

__device__ __forceinline__ float softplus(float x) {
  return fmaxf(x, 0.0F) + log1pf(expf(-fabsf(x)));
}

/// g = -exp(A_log) softplus(x), of x = a + dt_bias.
__device__ __forceinline__ float log_decay(float x, float minus_rate) {
  return isnan(x) ? x : minus_rate * softplus(x);
}

}  // namespace gdn::kernels::cuda
