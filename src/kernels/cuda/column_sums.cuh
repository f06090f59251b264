// Sums over rows in two steps, in an order that does not depend on how blocks run: blocks sum a
// part of the rows each, column by column, into scratch memory; one more kernel adds the parts.
#pragma once

#include <gdn/kernels/cuda/device.cuh>

namespace gdn::kernels::cuda {

/// Adds up the parts of a column a lane, then what the block's warps have; `write(column, sum)`
/// takes the sum.
template <typename Write>
__global__ void __launch_bounds__(kWarp* kWarp)
    add_parts_kernel(const float* parts, int64_t count, int64_t columns, Write write) {
  __shared__ float sums[kWarp][kWarp + 1];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t column = int64_t{blockIdx.x} * kWarp + lane;
  float sum = 0.0F;
  if (column < columns) {
#pragma unroll 8
    for (int64_t i = warp; i < count; i += kWarp) sum += parts[i * columns + column];
  }
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp > 0 || column >= columns) return;
  for (int i = 1; i < kWarp; ++i) sum += sums[i][lane];
  write(column, sum);
}

/// write(column, sum) for each column of parts [count, columns].
template <typename Write>
void add_parts(const float* parts, int64_t count, int64_t columns, cudaStream_t stream,
               const Write& write) {
  add_parts_kernel<<<static_cast<unsigned>(divide_up(columns, kWarp)), kWarp * kWarp, 0, stream>>>(
      parts, count, columns, write);
  check_launch("add_parts");
}

}  // namespace gdn::kernels::cuda
