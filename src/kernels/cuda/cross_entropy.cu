// Cross-entropy, a block a row of logits, which it reads once: each thread keeps the largest logit
// it has seen and the sum of the exponentials of the others' distances to it.
#include <cfloat>

#include <gdn/kernels/cuda/cross_entropy.h>
#include <gdn/kernels/cuda/device.cuh>

namespace gdn::kernels::cuda {
namespace {

constexpr int kBlock = 512;

__device__ bool in_vocabulary(const CrossEntropyProblem& p, int64_t target) {
  return target >= 0 && target < p.vocabulary;
}

template <typename T, int kCount>
__global__ void __launch_bounds__(kBlock) cross_entropy_kernel(CrossEntropyForward p) {
  auto* loss = static_cast<float*>(p.loss);
  auto* total = static_cast<float*>(p.log_sum_exp);
  for (int64_t m = blockIdx.x; m < p.M; m += gridDim.x) {
    const int64_t target = p.target[m];
    if (target == p.ignore_index) {
      if (threadIdx.x == 0) loss[m] = total[m] = 0.0F;
      continue;
    }
    const T* row = static_cast<const T*>(p.logits.data) + m * p.logits.stride;
    float largest = -FLT_MAX, sum = 0.0F;  // finite: -infinity less itself is no number
#pragma unroll 4
    for (int64_t i = threadIdx.x * kCount; i < p.vocabulary; i += kBlock * kCount) {
      float x[kCount];
      unpack(load_constant<kCount>(row + i), x);
      float next = largest;
#pragma unroll
      for (int j = 0; j < kCount; ++j) next = fmaxf(next, x[j]);
      sum *= exp2_fast(kLog2E * (largest - next));
      largest = next;
#pragma unroll
      for (int j = 0; j < kCount; ++j) sum += exp2_fast(kLog2E * (x[j] - largest));
    }
    const float thread_largest = largest;
    largest = block_max<kBlock>(largest);
    sum = row_sum<kBlock>(sum * exp2_fast(kLog2E * (thread_largest - largest)));
    if (threadIdx.x == 0) {
      total[m] = largest + logf(sum);
      loss[m] = in_vocabulary(p, target) ? total[m] - to_float(row[target]) : NAN;
    }
  }
}

template <typename T, int kCount>
__global__ void __launch_bounds__(kBlock) cross_entropy_backward_kernel(CrossEntropyBackward p) {
  for (int64_t m = blockIdx.x; m < p.M; m += gridDim.x) {
    const int64_t target = p.target[m];
    const bool ignored = target == p.ignore_index;
    const bool valid = in_vocabulary(p, target);
    const T* row = static_cast<const T*>(p.logits.data) + m * p.logits.stride;
    T* d_row = static_cast<T*>(p.d_logits.data) + m * p.d_logits.stride;
    const float total = static_cast<const float*>(p.log_sum_exp)[m];
    const float d_loss =
        ignored || valid ? static_cast<const float*>(p.d_loss)[m] : static_cast<float>(NAN);
    const float target_logit = !ignored && valid ? to_float(row[target]) : 0.0F;
    __syncthreads();  // before d_row, which may be row
    for (int64_t i = threadIdx.x * kCount; i < p.vocabulary; i += kBlock * kCount) {
      float x[kCount];
      if (ignored) {
#pragma unroll
        for (int j = 0; j < kCount; ++j) x[j] = 0.0F;
      } else {
        load<kCount>(row + i, x);
#pragma unroll
        for (int j = 0; j < kCount; ++j) {
          x[j] = d_loss * (i + j == target ? expm1f(target_logit - total) : expf(x[j] - total));
        }
      }
      store<kCount>(d_row + i, x);
    }
  }
}

/// Calls body with the element type and the vector length as constants.
template <typename Problem, typename Body, typename... Views>
void with_vectors(const Problem& p, const Body& body, const Views&... views) {
  with_element_type(p.dtype, [&]<typename T>(T*) {
    const bool aligned = (rows_aligned<T>(views.data, views.stride, 16) && ...);
    if (p.vocabulary % kVector<T> == 0 && aligned) {
      body.template operator()<T, kVector<T>>();
    } else {
      body.template operator()<T, 1>();
    }
  });
}

unsigned blocks(int64_t M) { return static_cast<unsigned>(std::min<int64_t>(M, INT32_MAX)); }

}  // namespace

void cross_entropy(const CrossEntropyForward& p, Stream stream) {
  if (p.M == 0) return;
  const auto launch = [&]<typename T, int kCount>() {
    cross_entropy_kernel<T, kCount><<<blocks(p.M), kBlock, 0, stream>>>(p);
  };
  with_vectors(p, launch, p.logits);
  check_launch("cross_entropy");
}

void cross_entropy_backward(const CrossEntropyBackward& p, Stream stream) {
  if (p.M == 0) return;
  const auto launch = [&]<typename T, int kCount>() {
    cross_entropy_backward_kernel<T, kCount><<<blocks(p.M), kBlock, 0, stream>>>(p);
  };
  with_vectors(p, launch, p.logits, p.d_logits);
  check_launch("cross_entropy_backward");
}

}  // namespace gdn::kernels::cuda
