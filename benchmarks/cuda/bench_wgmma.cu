// What docs/hopper.md assumes of wgmma: cycles from issue to a usable accumulator, and rates at
// small N, for one and two warpgroups on every multiprocessor.
#include <algorithm>
#include <cstdio>
#include <cuda_runtime.h>
#include <vector>

#include <gdn/kernels/cuda/sm90/wgmma.cuh>

namespace {

using namespace gdn::kernels::cuda::sm90;
using Element = __nv_bfloat16;

constexpr int kRounds = 256;

enum class Left { kRegisters, kShared };

__device__ void fill_with_noise(uint8_t* bytes, int size) {
  for (int i = threadIdx.x; i < size / 2; i += blockDim.x) {
    const unsigned hash = (i * 2654435761U + blockIdx.x * 40503U) ^ 0x9e3779b9U;
    reinterpret_cast<Element*>(bytes)[i] =
        __float2bfloat16(static_cast<float>(hash >> 16) / 65536.0F - 0.5F);
  }
  fence_async_proxy();
  __syncthreads();
}

/// Cycles of kCount products of one accumulator, waited for, on average over kRounds.
template <int N, Left kLeft, int kCount>
__global__ void measure_products(float* cycles, float* sink) {
  extern __shared__ __align__(1024) uint8_t shared[];
  fill_with_noise(shared, 64 * 1024);
  const uint64_t b = swizzled_tile(shared_address(shared));
  const uint64_t a_tile = swizzled_tile(shared_address(shared) + 32 * 1024);
  float d[N / 2] = {};
  uint32_t a[4] = {0x3c003c00, 0x3c013c00, 0x3c023c00, 0x3c033c00};
  const auto round = [&] {
    pin(d);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const uint32_t offset = (i % 4) * 32;
      if constexpr (kLeft == Left::kRegisters) {
        wgmma<Element, N>(d, a, advance(b, offset), 1);
      } else {
        wgmma<Element, N>(d, advance(a_tile, offset), advance(b, offset), 1);
      }
    }
    wgmma_commit();
    wgmma_wait<0>();
    pin(d);
  };
  round();
  __syncthreads();
  const long long begin = clock64();
  for (int r = 0; r < kRounds; ++r) round();
  const long long end = clock64();
  if (threadIdx.x == 0) cycles[blockIdx.x] = static_cast<float>(end - begin) / kRounds;
  float sum = 0;
  for (const float x : d) sum += x;
  sink[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}

/// A dependent chain: 8 products n64 -> 16-bit operand -> 4 products n64 -> 16-bit operand.
__global__ void measure_chain(float* cycles, float* sink) {
  extern __shared__ __align__(1024) uint8_t shared[];
  fill_with_noise(shared, 64 * 1024);
  const uint64_t b = swizzled_tile(shared_address(shared));
  float d[32] = {};
  uint32_t a[8][4] = {};
  const auto convert = [&] {
#pragma unroll
    for (int s = 0; s < 8; ++s) {
#pragma unroll
      for (int m = 0; m < 4; ++m)
        a[s][m] = pack<Element>(d[(8 * s + 2 * m) % 32], d[(8 * s + 2 * m + 1) % 32]);
    }
  };
  const auto multiply = [&](int count) {
    pin(d);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i < count) wgmma<Element, 64>(d, a[i], advance(b, (i % 4) * 32), i > 0);
    }
    wgmma_commit();
    wgmma_wait<0>();
    pin(d);
  };
  __syncthreads();
  const long long begin = clock64();
  for (int r = 0; r < kRounds; ++r) {
    convert();
    multiply(8);
    convert();
    multiply(4);
  }
  const long long end = clock64();
  if (threadIdx.x == 0) cycles[blockIdx.x] = static_cast<float>(end - begin) / kRounds;
  float sum = 0;
  for (const float x : d) sum += x;
  sink[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}

void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s\n", cudaGetErrorString(error));
  std::exit(1);
}

struct Bench {
  float* cycles = nullptr;
  float* sink = nullptr;
  int blocks = 0;

  Bench() {
    check(cudaDeviceGetAttribute(&blocks, cudaDevAttrMultiProcessorCount, 0));
    check(cudaMalloc(&cycles, blocks * sizeof(float)));
    check(cudaMalloc(&sink, blocks * 256 * sizeof(float)));
  }

  template <typename Kernel>
  float run(Kernel* kernel, int warpgroups) {
    constexpr int kBytes = 128 * 1024;  // one block a multiprocessor
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
    for (int repeat = 0; repeat < 3; ++repeat) {
      kernel<<<blocks, 128 * warpgroups, kBytes>>>(cycles, sink);
    }
    check(cudaGetLastError());
    check(cudaDeviceSynchronize());
    std::vector<float> host(blocks);
    check(cudaMemcpy(host.data(), cycles, blocks * sizeof(float), cudaMemcpyDeviceToHost));
    std::nth_element(host.begin(), host.begin() + blocks / 2, host.end());
    return host[blocks / 2];
  }

  template <int N, Left kLeft>
  void row() {
    std::printf("%-4s n%-4d", kLeft == Left::kShared ? "SS" : "RS", N);
    for (const int warpgroups : {1, 2}) {
      const float one = run(measure_products<N, kLeft, 1>, warpgroups);
      const float four = run(measure_products<N, kLeft, 4>, warpgroups);
      const float eight = run(measure_products<N, kLeft, 8>, warpgroups);
      const float sixteen = run(measure_products<N, kLeft, 16>, warpgroups);
      std::printf("  | %6.1f %6.1f %6.1f %6.1f  %6.1f", one, four, eight, sixteen,
                  (sixteen - eight) / 8);
    }
    std::printf("\n");
  }
};

}  // namespace

int main() {
  Bench bench;
  std::printf("cycles for 1, 4, 8, 16 products k16 and a wait, and per further product\n");
  std::printf("          | one warpgroup                       | two warpgroups\n");
  bench.row<16, Left::kRegisters>();
  bench.row<32, Left::kRegisters>();
  bench.row<48, Left::kRegisters>();
  bench.row<64, Left::kRegisters>();
  bench.row<128, Left::kRegisters>();
  bench.row<16, Left::kShared>();
  bench.row<32, Left::kShared>();
  bench.row<48, Left::kShared>();
  bench.row<64, Left::kShared>();
  bench.row<128, Left::kShared>();
  for (const int warpgroups : {1, 2}) {
    std::printf("chain of 8, convert, 4, convert (n64), %d warpgroup(s): %.1f cycles\n", warpgroups,
                bench.run(measure_chain, warpgroups));
  }
  return 0;
}
