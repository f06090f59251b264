// RMSNorm, gated RMSNorm and L2 norm: half a warp, a warp or a block a row, by its length. Rows
// that fit the registers are read once; of longer ones the second read comes from the cache.
#include <gdn/kernels/cuda/column_sums.cuh>
#include <gdn/kernels/cuda/norm.h>

namespace gdn::kernels::cuda {
namespace {

constexpr int kBlock = 256;
constexpr int kHalfWarp = 16;
constexpr int64_t kWarpColumns = 1024;  // longer rows get a whole block

/// Row m of x, the gate and the weight at columns i to i + kCount - 1.
template <typename T, int kCount>
struct Columns {
  float x[kCount], weight[kCount], gate[kCount];

  Columns() = default;
  __device__ Columns(const NormProblem& p, int64_t m, int64_t i) {
    load<kCount>(static_cast<const T*>(p.x.data) + m * p.x.stride + i, x);
    if (p.weight != nullptr) load_parameter<T>(p.weight, p.weight_dtype, i, weight);
    if (p.gate.data != nullptr) {
      load<kCount>(static_cast<const T*>(p.gate.data) + m * p.gate.stride + i, gate);
    }
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      if (p.weight == nullptr) weight[j] = 1.0F;
    }
  }
};

__device__ float per_row(const NormProblem& p) {
  return p.kind == NormKind::rms ? 1.0F / static_cast<float>(p.D) : 1.0F;
}

__device__ float row_factor(const NormProblem& p, float squares) {
  return 1.0F / sqrtf(squares * per_row(p) + static_cast<float>(p.eps));
}

/// The row of this thread's group of kThreads threads. Groups beyond the last row work on that one
/// with the others of their warp, and write nothing.
template <int kThreads>
struct GroupRow {
  int64_t m;
  bool real;

  __device__ explicit GroupRow(int64_t M)
      : m(int64_t{blockIdx.x} * (kBlock / kThreads) + threadIdx.x / kThreads), real(m < M) {
    if (!real) m = M - 1;
  }
};

/// kOnce: D is at most kThreads kCount, so each thread has one piece of a row.
template <typename T, int kCount, int kThreads, bool kOnce>
__global__ void __launch_bounds__(kBlock) norm_kernel(NormForward p) {
  const GroupRow<kThreads> row(p.M);
  const int64_t first = threadIdx.x % kThreads * kCount;
  Columns<T, kCount> kept;
  float squares = 0.0F;
  for (int64_t i = first; i < p.D; i += kThreads * kCount) {
    if constexpr (kOnce) {
      kept = Columns<T, kCount>(p, row.m, i);
    } else {
      load<kCount>(static_cast<const T*>(p.x.data) + row.m * p.x.stride + i, kept.x);
    }
#pragma unroll
    for (int j = 0; j < kCount; ++j) squares = fmaf(kept.x[j], kept.x[j], squares);
  }
  const float r = row_factor(p, row_sum<kThreads>(squares));
  if (!row.real) return;
  for (int64_t i = first; i < p.D; i += kThreads * kCount) {
    if constexpr (!kOnce) kept = Columns<T, kCount>(p, row.m, i);
    float y[kCount];
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      y[j] = kept.x[j] * r * kept.weight[j];
      if (p.gate.data != nullptr) y[j] *= silu(kept.gate[j]);
    }
    store<kCount>(static_cast<T*>(p.y.data) + row.m * p.y.stride + i, y);
  }
}

template <typename T, int kCount, int kThreads, bool kOnce>
__global__ void __launch_bounds__(kBlock) norm_backward_kernel(NormBackward p, float* factors) {
  const GroupRow<kThreads> row(p.M);
  const int64_t first = threadIdx.x % kThreads * kCount;
  const T* d_y_row = static_cast<const T*>(p.d_y.data) + row.m * p.d_y.stride;
  Columns<T, kCount> kept;
  float d_y[kCount];
  float squares = 0.0F, products = 0.0F;  // of x x and h x
  for (int64_t i = first; i < p.D; i += kThreads * kCount) {
    kept = Columns<T, kCount>(p, row.m, i);
    load<kCount>(d_y_row + i, d_y);
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const float active = p.gate.data != nullptr ? silu(kept.gate[j]) : 1.0F;
      squares = fmaf(kept.x[j], kept.x[j], squares);
      products = fmaf(d_y[j] * kept.weight[j] * active, kept.x[j], products);
    }
  }
  const float r = row_factor(p, row_sum<kThreads>(squares));
  const float mean = row_sum<kThreads>(products) * r * per_row(p);
  if (!row.real) return;
  if (factors != nullptr && threadIdx.x % kThreads == 0) factors[row.m] = r;
  for (int64_t i = first; i < p.D; i += kThreads * kCount) {
    if constexpr (!kOnce) {
      kept = Columns<T, kCount>(p, row.m, i);
      load<kCount>(d_y_row + i, d_y);
    }
    float d_x[kCount], d_gate[kCount];
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const float normed = kept.x[j] * r;
      float h = d_y[j] * kept.weight[j];
      if (p.gate.data != nullptr) {
        d_gate[j] = h * normed * silu_gradient(kept.gate[j]);
        h *= silu(kept.gate[j]);
      }
      d_x[j] = r * (h - normed * mean);
    }
    store<kCount>(static_cast<T*>(p.d_x.data) + row.m * p.d_x.stride + i, d_x);
    if (p.gate.data != nullptr) {
      store<kCount>(static_cast<T*>(p.d_gate.data) + row.m * p.d_gate.stride + i, d_gate);
    }
  }
}

/// parts [row parts, D]: the sums of d_y silu(gate) x r over the rows of each part.
template <typename T, int kCount>
__global__ void __launch_bounds__(kColumnWarps* kWarp)
    weight_gradient_kernel(NormBackward p, const float* factors, int64_t rows, float* parts) {
  const int64_t i = (int64_t{blockIdx.x} * kWarp + threadIdx.x % kWarp) * kCount;
  const int64_t end = min(p.M, (blockIdx.y + 1) * rows);
  float sum[kCount] = {};
  if (i < p.D) {
#pragma unroll 4
    for (int64_t m = blockIdx.y * rows + threadIdx.x / kWarp; m < end; m += kColumnWarps) {
      float x[kCount], d_y[kCount], gate[kCount];
      load<kCount>(static_cast<const T*>(p.x.data) + m * p.x.stride + i, x);
      load<kCount>(static_cast<const T*>(p.d_y.data) + m * p.d_y.stride + i, d_y);
      if (p.gate.data != nullptr) {
        load<kCount>(static_cast<const T*>(p.gate.data) + m * p.gate.stride + i, gate);
      }
      const float factor = factors[m];
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        if (p.gate.data != nullptr) d_y[j] *= silu(gate[j]);
        sum[j] = fmaf(d_y[j], x[j] * factor, sum[j]);
      }
    }
  }
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    const float total = sum_over_warps(sum[j]);
    if (threadIdx.x < kWarp && i < p.D) parts[blockIdx.y * p.D + i + j] = total;
  }
}

/// Calls body with the element type, the vector length, the threads a row and whether they hold it
/// at once as constants.
template <typename Problem, typename Body>
void with_row_shape(const Problem& p, const auto& aligned, const Body& body) {
  with_element_type(p.dtype, [&]<typename T>(T*) {
    const auto with_count = [&]<int kCount>() {
      if (p.D <= kHalfWarp * kCount) {
        body.template operator()<T, kCount, kHalfWarp, true>();
      } else if (p.D <= kWarp * kCount) {
        body.template operator()<T, kCount, kWarp, true>();
      } else if (p.D <= kWarpColumns) {
        body.template operator()<T, kCount, kWarp, false>();
      } else if (p.D <= kBlock * kCount) {
        body.template operator()<T, kCount, kBlock, true>();
      } else {
        body.template operator()<T, kCount, kBlock, false>();
      }
    };
    if (p.D % kVector<T> == 0 && aligned.template operator()<T>()) {
      with_count.template operator()<kVector<T>>();
    } else {
      with_count.template operator()<1>();
    }
  });
}

template <typename T>
bool inputs_aligned(const NormProblem& p) {
  return rows_aligned<T>(p.x.data, p.x.stride, 16) && rows_aligned<T>(p.weight, 0, 16) &&
         (p.gate.data == nullptr || rows_aligned<T>(p.gate.data, p.gate.stride, 16));
}

unsigned blocks(int64_t M, int threads) {
  return static_cast<unsigned>(divide_up(M, kBlock / threads));
}

}  // namespace

void norm(const NormForward& p, Stream stream) {
  if (p.M == 0 || p.D == 0) return;
  const auto aligned = [&]<typename T>() {
    return inputs_aligned<T>(p) && rows_aligned<T>(p.y.data, p.y.stride, 16);
  };
  with_row_shape(p, aligned, [&]<typename T, int kCount, int kThreads, bool kOnce>() {
    norm_kernel<T, kCount, kThreads, kOnce><<<blocks(p.M, kThreads), kBlock, 0, stream>>>(p);
  });
  check_launch("norm");
}

int64_t norm_backward_scratch(const NormBackward& p) {
  if (p.d_weight == nullptr) return 0;
  return scratch_floats(p.M) + scratch_floats(row_parts(p.M).count * p.D);
}

void norm_backward(const NormBackward& p, void* scratch, Stream stream) {
  if (p.D == 0) return;
  auto* factors = p.d_weight == nullptr ? nullptr : static_cast<float*>(scratch);
  const auto aligned = [&]<typename T>() {
    return inputs_aligned<T>(p) && rows_aligned<T>(p.d_y.data, p.d_y.stride, 16) &&
           rows_aligned<T>(p.d_x.data, p.d_x.stride, 16) &&
           (p.gate.data == nullptr || rows_aligned<T>(p.d_gate.data, p.d_gate.stride, 16));
  };
  if (p.M > 0) {
    with_row_shape(p, aligned, [&]<typename T, int kCount, int kThreads, bool kOnce>() {
      norm_backward_kernel<T, kCount, kThreads, kOnce>
          <<<blocks(p.M, kThreads), kBlock, 0, stream>>>(p, factors);
    });
    check_launch("norm_backward");
  }
  if (p.d_weight == nullptr) return;
  const RowParts parts = row_parts(p.M);
  float* sums = factors + scratch_floats(p.M) / 4;
  with_element_type(p.dtype, [&]<typename T>(T*) {
    const auto launch = [&]<int kCount>() {
      const dim3 grid(static_cast<unsigned>(divide_up(p.D, kWarp * kCount)),
                      static_cast<unsigned>(parts.count));
      weight_gradient_kernel<T, kCount>
          <<<grid, kColumnWarps * kWarp, 0, stream>>>(p, factors, parts.rows, sums);
    };
    if (p.D % 4 == 0 && aligned.template operator()<T>()) {
      launch.template operator()<4>();
    } else {
      launch.template operator()<1>();
    }
  });
  check_launch("norm_backward, weight");
  add_parts(sums, parts.count, p.D, static_cast<float*>(p.d_weight), stream);
}

}  // namespace gdn::kernels::cuda
