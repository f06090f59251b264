// Sums over rows in two steps, in an order that does not depend on how blocks run: blocks sum a
// part of the rows each, column by column, into scratch memory; one more kernel adds the parts.
#pragma once

#include <gdn/kernels/cuda/device.cuh>

namespace gdn::kernels::cuda {

inline constexpr int kColumnWarps = 8;
inline constexpr int64_t kMaxParts = 256;

/// How rows are cut into parts: as many as keep a GPU busy, of at least 64 rows.
struct RowParts {
  int64_t count, rows;
};
inline RowParts row_parts(int64_t M) {
  const int64_t rows = std::max<int64_t>(64, divide_up(M, kMaxParts));
  return {std::max<int64_t>(1, divide_up(M, rows)), rows};
}

/// Adds up what the warps of a block have for one column a lane; the result is warp 0's.
__device__ __forceinline__ float sum_over_warps(float x) {
  __shared__ float sums[kColumnWarps][kWarp];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  __syncthreads();
  sums[warp][lane] = x;
  __syncthreads();
  float sum = 0.0F;
#pragma unroll
  for (int i = 0; i < kColumnWarps; ++i) sum += sums[i][lane];
  return sum;
}

static __global__ void add_parts_kernel(const float* parts, int64_t count, int64_t columns,
                                        float* sum) {
  const int64_t column = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (column >= columns) return;
  float total = 0.0F;
  for (int64_t i = 0; i < count; ++i) total += parts[i * columns + column];
  sum[column] = total;
}

/// sum [columns] of parts [count, columns].
inline void add_parts(const float* parts, int64_t count, int64_t columns, float* sum,
                      cudaStream_t stream) {
  constexpr int kThreads = 128;
  add_parts_kernel<<<static_cast<unsigned>(divide_up(columns, kThreads)), kThreads, 0, stream>>>(
      parts, count, columns, sum);
  check_launch("add_parts");
}

}  // namespace gdn::kernels::cuda
