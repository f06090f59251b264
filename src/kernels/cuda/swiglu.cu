// SwiGLU, 16 bytes of each tensor a thread.
#include <gdn/kernels/cuda/device.cuh>
#include <gdn/kernels/cuda/swiglu.h>

namespace gdn::kernels::cuda {
namespace {

constexpr int kBlock = 256;

template <typename T, int kCount>
__global__ void __launch_bounds__(kBlock) swiglu_kernel(SwigluForward p) {
  const int64_t i = (int64_t{blockIdx.x} * kBlock + threadIdx.x) * kCount;
  if (i >= p.D) return;
  for (int64_t m = blockIdx.y; m < p.M; m += gridDim.y) {
    float gate[kCount], up[kCount], y[kCount];
    load<kCount>(static_cast<const T*>(p.gate.data) + m * p.gate.stride + i, gate);
    load<kCount>(static_cast<const T*>(p.up.data) + m * p.up.stride + i, up);
#pragma unroll
    for (int j = 0; j < kCount; ++j) y[j] = silu(gate[j]) * up[j];
    store<kCount>(static_cast<T*>(p.y.data) + m * p.y.stride + i, y);
  }
}

template <typename T, int kCount>
__global__ void __launch_bounds__(kBlock) swiglu_backward_kernel(SwigluBackward p) {
  const int64_t i = (int64_t{blockIdx.x} * kBlock + threadIdx.x) * kCount;
  if (i >= p.D) return;
  for (int64_t m = blockIdx.y; m < p.M; m += gridDim.y) {
    float gate[kCount], up[kCount], d_y[kCount], d_gate[kCount], d_up[kCount];
    load<kCount>(static_cast<const T*>(p.gate.data) + m * p.gate.stride + i, gate);
    load<kCount>(static_cast<const T*>(p.up.data) + m * p.up.stride + i, up);
    load<kCount>(static_cast<const T*>(p.d_y.data) + m * p.d_y.stride + i, d_y);
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      d_gate[j] = d_y[j] * up[j] * silu_gradient(gate[j]);
      d_up[j] = d_y[j] * silu(gate[j]);
    }
    store<kCount>(static_cast<T*>(p.d_gate.data) + m * p.d_gate.stride + i, d_gate);
    store<kCount>(static_cast<T*>(p.d_up.data) + m * p.d_up.stride + i, d_up);
  }
}

/// Calls body with the element type and the vector length as constants, and the grid.
template <typename Problem, typename Body, typename... Views>
void with_vectors(const Problem& p, const Body& body, const Views&... views) {
  with_element_type(p.dtype, [&]<typename T>(T*) {
    const auto grid = [&](int count) {
      constexpr int64_t kMaxRows = 65535;  // of a grid's second dimension; blocks loop over more
      return dim3(static_cast<unsigned>(divide_up(p.D, int64_t{kBlock} * count)),
                  static_cast<unsigned>(std::min(p.M, kMaxRows)));
    };
    const bool aligned = (rows_aligned<T>(views.data, views.stride, 16) && ...);
    if (p.D % kVector<T> == 0 && aligned) {
      body.template operator()<T, kVector<T>>(grid(kVector<T>));
    } else {
      body.template operator()<T, 1>(grid(1));
    }
  });
}

/// The same problem as one long row, where the rows of all tensors follow one another.
template <typename Problem, typename... Views>
Problem flattened(Problem p, const Views&... views) {
  if (((views.stride == p.D) && ...)) {
    p.D *= p.M;
    p.M = 1;
  }
  return p;
}

}  // namespace

void swiglu(const SwigluForward& problem, Stream stream) {
  if (problem.M == 0 || problem.D == 0) return;
  const SwigluForward p = flattened(problem, problem.gate, problem.up, problem.y);
  const auto launch = [&]<typename T, int kCount>(dim3 grid) {
    swiglu_kernel<T, kCount><<<grid, kBlock, 0, stream>>>(p);
  };
  with_vectors(p, launch, p.gate, p.up, p.y);
  check_launch("swiglu");
}

void swiglu_backward(const SwigluBackward& problem, Stream stream) {
  if (problem.M == 0 || problem.D == 0) return;
  const SwigluBackward p =
      flattened(problem, problem.gate, problem.up, problem.d_y, problem.d_gate, problem.d_up);
  const auto launch = [&]<typename T, int kCount>(dim3 grid) {
    swiglu_backward_kernel<T, kCount><<<grid, kBlock, 0, stream>>>(p);
  };
  with_vectors(p, launch, p.gate, p.up, p.d_y, p.d_gate, p.d_up);
  check_launch("swiglu_backward");
}

}  // namespace gdn::kernels::cuda
