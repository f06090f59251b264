// The gate g = -exp(A_log) softplus(a + dt_bias) and its gradients. A thread has the elements of
// one value head in every kBlock / HV'th row, where that many heads fit a block.
#include <gdn/kernels/cuda/column_sums.cuh>
#include <gdn/kernels/cuda/gate.cuh>
#include <gdn/kernels/cuda/gate.h>

namespace gdn::kernels::cuda {
namespace {

constexpr int kBlock = 256;
constexpr int kRows = 4;  // of a thread at once

/// The elements of a block: up to kBlock heads of a range of rows. Grid: heads, then ranges.
struct Range {
  int64_t HV;
  int64_t h;        // the thread's head; HV or more: none
  int64_t row;      // the thread's first row
  int64_t end;      // of the range
  int heads, step;  // of the block; rows from one of the thread's to the next

  __device__ Range(const GateProblem& p, int64_t rows)
      : HV(p.HV),
        end(min(p.M, (int64_t{blockIdx.y} + 1) * rows)),
        heads(static_cast<int>(min(p.HV, int64_t{kBlock}))),
        step(kBlock / heads) {
    const int thread = static_cast<int>(threadIdx.x);
    h = int64_t{blockIdx.x} * kBlock + thread % heads;
    row = blockIdx.y * rows + thread / heads;
    if (thread / heads >= step) h = HV;
  }
  /// Of the thread's r'th row from row m on.
  __device__ bool has(int64_t m, int r) const { return m + r * step < end; }
  __device__ int64_t index(int64_t m, int r) const { return (m + r * step) * HV + h; }
};

template <typename T>
__global__ void __launch_bounds__(kBlock) gate_kernel(GateForward p, int64_t rows) {
  const Range range(p, rows);
  if (range.h >= p.HV) return;
  const float minus_rate = -expf(static_cast<const float*>(p.A_log)[range.h]);
  const float bias = static_cast<const float*>(p.dt_bias)[range.h];
  for (int64_t m = range.row; m < range.end; m += kRows * range.step) {
    T a[kRows] = {};
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (range.has(m, r)) a[r] = static_cast<const T*>(p.a)[range.index(m, r)];
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (!range.has(m, r)) continue;
      const float x = to_float(a[r]) + bias;
      static_cast<float*>(p.g)[range.index(m, r)] = log_decay(x, minus_rate);
    }
  }
}

/// parts [ranges of rows, 2, HV]: d_A_log, d_dt_bias.
template <typename T>
__global__ void __launch_bounds__(kBlock)
    gate_backward_kernel(GateBackward p, int64_t rows, float* parts) {
  const Range range(p, rows);
  float d_A_log = 0.0F, d_dt_bias = 0.0F;
  if (range.h < p.HV) {
    const float minus_rate = -expf(static_cast<const float*>(p.A_log)[range.h]);
    const float bias = static_cast<const float*>(p.dt_bias)[range.h];
    for (int64_t m = range.row; m < range.end; m += kRows * range.step) {
      T a[kRows] = {};
      float d_g[kRows] = {};
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (!range.has(m, r)) continue;
        a[r] = static_cast<const T*>(p.a)[range.index(m, r)];
        d_g[r] = static_cast<const float*>(p.d_g)[range.index(m, r)];
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (!range.has(m, r)) continue;
        const float x = to_float(a[r]) + bias, scaled = d_g[r] * minus_rate;
        const float d_x = scaled * sigmoid(x);
        static_cast<T*>(p.d_a)[range.index(m, r)] = from_float<T>(d_x);
        d_dt_bias += d_x;
        d_A_log = fmaf(scaled, softplus(x), d_A_log);
      }
    }
  }
  __shared__ float sums[2][kBlock];
  sums[0][threadIdx.x] = d_A_log;
  sums[1][threadIdx.x] = d_dt_bias;
  __syncthreads();
  if (threadIdx.x >= range.heads || range.h >= p.HV) return;
  for (int i = 1; i < range.step; ++i) {
    d_A_log += sums[0][threadIdx.x + i * range.heads];
    d_dt_bias += sums[1][threadIdx.x + i * range.heads];
  }
  parts[int64_t{blockIdx.y} * 2 * p.HV + range.h] = d_A_log;
  parts[(int64_t{blockIdx.y} * 2 + 1) * p.HV + range.h] = d_dt_bias;
}

struct WriteGradients {
  GateBackward p;
  __device__ void operator()(int64_t column, float sum) const {
    float* gradient = static_cast<float*>(column < p.HV ? p.d_A_log : p.d_dt_bias);
    gradient[column % p.HV] = sum;
  }
};

/// How rows are cut into ranges: kRows a thread, but not more ranges than the limit.
struct Ranges {
  int64_t count, rows;
  dim3 grid;
};
Ranges ranges(const GateProblem& p, int64_t limit) {
  const int64_t step = kBlock / std::min<int64_t>(p.HV, kBlock);
  const int64_t rows = std::max(kRows * step, divide_up(p.M, limit));
  const int64_t count = std::max<int64_t>(1, divide_up(p.M, rows));
  return {count, rows,
          dim3(static_cast<unsigned>(divide_up(p.HV, kBlock)), static_cast<unsigned>(count))};
}

constexpr int64_t kForwardLimit = 65535;
constexpr int64_t kBackwardLimit = 512;  // one kernel adds them up

}  // namespace

void gate(const GateForward& p, Stream stream) {
  if (p.M == 0 || p.HV == 0) return;
  const Ranges r = ranges(p, kForwardLimit);
  with_element_type(
      p.dtype, [&]<typename T>(T*) { gate_kernel<T><<<r.grid, kBlock, 0, stream>>>(p, r.rows); });
  check_launch("gate");
}

int64_t gate_backward_scratch(const GateBackward& p) {
  return p.HV == 0 ? 0 : scratch_floats(ranges(p, kBackwardLimit).count * 2 * p.HV);
}

void gate_backward(const GateBackward& p, void* scratch, Stream stream) {
  if (p.HV == 0) return;
  const Ranges r = ranges(p, kBackwardLimit);
  auto* parts = static_cast<float*>(scratch);
  with_element_type(p.dtype, [&]<typename T>(T*) {
    gate_backward_kernel<T><<<r.grid, kBlock, 0, stream>>>(p, r.rows, parts);
  });
  check_launch("gate_backward");
  add_parts(parts, r.count, 2 * p.HV, stream, WriteGradients{p});
}

}  // namespace gdn::kernels::cuda
