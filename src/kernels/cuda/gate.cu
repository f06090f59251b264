// The gate g = -exp(A_log) softplus(a + dt_bias) and its gradients.
#include <gdn/kernels/cuda/column_sums.cuh>
#include <gdn/kernels/cuda/gate.h>

namespace gdn::kernels::cuda {
namespace {

constexpr int kBlock = 256;

__device__ float softplus(float x) { return fmaxf(x, 0.0F) + log1pf(expf(-fabsf(x))); }

template <typename T>
__global__ void __launch_bounds__(kBlock) gate_kernel(GateForward p) {
  const int64_t count = p.M * p.HV;
  for (int64_t i = int64_t{blockIdx.x} * kBlock + threadIdx.x; i < count;
       i += int64_t{gridDim.x} * kBlock) {
    const int64_t h = i % p.HV;
    const float rate = expf(static_cast<const float*>(p.A_log)[h]);
    const float x =
        to_float(static_cast<const T*>(p.a)[i]) + static_cast<const float*>(p.dt_bias)[h];
    static_cast<float*>(p.g)[i] = isnan(x) ? x : -rate * softplus(x);
  }
}

/// A lane a value head, a warp a row at a time. parts [row parts, 2, HV]: d_A_log, d_dt_bias.
template <typename T>
__global__ void __launch_bounds__(kColumnWarps* kWarp)
    gate_backward_kernel(GateBackward p, int64_t rows, float* parts) {
  const int64_t h = int64_t{blockIdx.x} * kWarp + threadIdx.x % kWarp;
  const int64_t end = min(p.M, (blockIdx.y + 1) * rows);
  float d_A_log = 0.0F, d_dt_bias = 0.0F;
  if (h < p.HV) {
    const float minus_rate = -expf(static_cast<const float*>(p.A_log)[h]);
    const float bias = static_cast<const float*>(p.dt_bias)[h];
    for (int64_t m = blockIdx.y * rows + threadIdx.x / kWarp; m < end; m += kColumnWarps) {
      const int64_t i = m * p.HV + h;
      const float x = to_float(static_cast<const T*>(p.a)[i]) + bias;
      const float scaled = static_cast<const float*>(p.d_g)[i] * minus_rate;
      const float d_x = scaled * sigmoid(x);
      static_cast<T*>(p.d_a)[i] = from_float<T>(d_x);
      d_dt_bias += d_x;
      d_A_log = fmaf(scaled, softplus(x), d_A_log);
    }
  }
  d_A_log = sum_over_warps(d_A_log);
  d_dt_bias = sum_over_warps(d_dt_bias);
  if (threadIdx.x < kWarp && h < p.HV) {
    parts[blockIdx.y * 2 * p.HV + h] = d_A_log;
    parts[(blockIdx.y * 2 + 1) * p.HV + h] = d_dt_bias;
  }
}

}  // namespace

void gate(const GateForward& p, Stream stream) {
  if (p.M == 0 || p.HV == 0) return;
  constexpr int64_t kMaxBlocks = 4096;
  const auto blocks = static_cast<unsigned>(std::min(divide_up(p.M * p.HV, kBlock), kMaxBlocks));
  with_element_type(p.dtype,
                    [&]<typename T>(T*) { gate_kernel<T><<<blocks, kBlock, 0, stream>>>(p); });
  check_launch("gate");
}

int64_t gate_backward_scratch(const GateBackward& p) {
  return scratch_floats(row_parts(p.M).count * 2 * p.HV) + scratch_floats(2 * p.HV);
}

void gate_backward(const GateBackward& p, void* scratch, Stream stream) {
  if (p.HV == 0) return;
  const RowParts parts = row_parts(p.M);
  auto* sums = static_cast<float*>(scratch);
  float* total = sums + scratch_floats(parts.count * 2 * p.HV) / 4;
  const dim3 grid(static_cast<unsigned>(divide_up(p.HV, kWarp)),
                  static_cast<unsigned>(parts.count));
  with_element_type(p.dtype, [&]<typename T>(T*) {
    gate_backward_kernel<T><<<grid, kColumnWarps * kWarp, 0, stream>>>(p, parts.rows, sums);
  });
  check_launch("gate_backward");
  add_parts(sums, parts.count, 2 * p.HV, total, stream);
  const size_t bytes = static_cast<size_t>(p.HV) * sizeof(float);
  cudaMemcpyAsync(p.d_A_log, total, bytes, cudaMemcpyDeviceToDevice, stream);
  cudaMemcpyAsync(p.d_dt_bias, total + p.HV, bytes, cudaMemcpyDeviceToDevice, stream);
  check_launch("gate_backward, copy");
}

}  // namespace gdn::kernels::cuda
