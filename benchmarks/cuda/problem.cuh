// Problems of the gated delta rule for benchmarks, and their timing. Inputs as in the published
// benchmarks: q, k normalised, g = logsigmoid(normal) / 16, beta = sigmoid(normal), final state
// wanted.
#pragma once

#include <algorithm>
#include <cmath>
#include <cuda_runtime.h>
#include <string>
#include <vector>

#include <gdn/kernels/cuda/sm90/gated_delta_rule/launch.cuh>

#include "measure.cuh"

namespace gdn::benchmarks {

using namespace gdn::kernels;
namespace sm90 = gdn::kernels::cuda::sm90;

/// One block a row, one thread an element.
__global__ void fill_rows(__nv_bfloat16* rows, uint64_t seed, bool normalise) {
  __shared__ float squares[32];
  const int64_t index = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const float x = normal(index, seed);
  float sum = x * x;
  for (int d = 16; d > 0; d /= 2) sum += __shfl_xor_sync(0xffffffffU, sum, d);
  if (threadIdx.x % 32 == 0) squares[threadIdx.x / 32] = sum;
  __syncthreads();
  sum = 0;
  for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) sum += squares[warp];
  rows[index] = __float2bfloat16(normalise ? x * rsqrtf(sum + 1e-6F) : x);
}

__global__ void fill_gates(float* g, float* beta, int64_t count, uint64_t seed) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= count) return;
  g[i] = -log1pf(expf(-normal(i, seed))) / 16;
  beta[i] = 1 / (1 + expf(-normal(i, seed + 1)));
}

template <typename T>
T* allocate(int64_t count) {
  void* memory = nullptr;
  check(cudaMalloc(&memory, std::max<int64_t>(count, 1) * sizeof(T)), "cudaMalloc");
  return static_cast<T*>(memory);
}

struct Shape {
  int H, HV;
  std::vector<int64_t> lengths;
  double best_published = 0;  // milliseconds
  int K = 128, V = 128;       // multiples of 32
};

struct Problem {
  GatedDeltaRuleForward p;
  int64_t longest;  // tokens of a sequence
  std::vector<void*> memory;

  explicit Problem(const Shape& shape) {
    std::vector<int64_t> boundaries = {0};
    for (const int64_t length : shape.lengths) boundaries.push_back(boundaries.back() + length);
    const int64_t T = boundaries.back();
    p.B = 1;
    p.T = T;
    p.H = shape.H;
    p.HV = shape.HV;
    p.K = shape.K;
    p.V = shape.V;
    p.N = static_cast<int64_t>(shape.lengths.size());
    p.dtype = DType::bf16;
    p.scale = 1 / std::sqrt(static_cast<double>(p.K));
    auto* q = allocate<__nv_bfloat16>(T * p.H * p.K);
    auto* k = allocate<__nv_bfloat16>(T * p.H * p.K);
    auto* v = allocate<__nv_bfloat16>(T * p.HV * p.V);
    auto* o = allocate<__nv_bfloat16>(T * p.HV * p.V);
    auto* g = allocate<float>(T * p.HV);
    auto* beta = allocate<float>(T * p.HV);
    auto* cu_seqlens = allocate<int64_t>(p.N + 1);
    auto* final_state = allocate<float>(p.N * p.HV * p.K * p.V);
    memory = {q, k, v, o, g, beta, cu_seqlens, final_state};
    fill_rows<<<T * p.H, p.K>>>(q, 1, true);
    fill_rows<<<T * p.H, p.K>>>(k, 2, true);
    fill_rows<<<T * p.HV, p.V>>>(v, 3, false);
    fill_gates<<<(T * p.HV + 255) / 256, 256>>>(g, beta, T * p.HV, 4);
    check(cudaMemcpy(cu_seqlens, boundaries.data(), boundaries.size() * sizeof(int64_t),
                     cudaMemcpyHostToDevice),
          "cu_seqlens");
    p.cu_seqlens = cu_seqlens;
    p.q = {q, 0, p.H * p.K, p.K};
    p.k = {k, 0, p.H * p.K, p.K};
    p.v = {v, 0, p.HV * p.V, p.V};
    p.o = {o, 0, p.HV * p.V, p.V};
    p.g = g;
    p.beta = beta;
    p.final_state = final_state;
    longest = *std::max_element(shape.lengths.begin(), shape.lengths.end());
  }
  Problem(const Problem&) = delete;
  Problem& operator=(const Problem&) = delete;
  ~Problem() {
    for (void* pointer : memory) cudaFree(pointer);
  }
};

/// Device memory for as long as the object lives.
struct Scratch {
  void* data;
  explicit Scratch(size_t bytes) : data(allocate<uint8_t>(static_cast<int64_t>(bytes))) {}
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { cudaFree(data); }
};

}  // namespace gdn::benchmarks
