// The forward as one kernel: one block a sequence, value head and 128 of V's columns, its
// warpgroups specialised by role. split.cuh has the other form, for few sequences and heads.
#pragma once

#include <gdn/kernels/cuda/sm90/gated_delta_rule/chunk_matrices.cuh>
#include <gdn/kernels/cuda/sm90/gated_delta_rule/loads.cuh>
#include <gdn/kernels/cuda/sm90/gated_delta_rule/state.cuh>

namespace gdn::kernels::cuda::sm90 {

__device__ inline void initialise(SharedMemory& shared, const ForwardArguments& p) {
  constexpr int kStateWarps = 8;
  constexpr int kMatrixWarps = 4;
  if (threadIdx.x == 0) {
    init_barriers(shared.key_full, shared.key_empty, 1, kStateWarps);
    init_barriers(shared.value_full, shared.value_empty, 1, kStateWarps);
    init_barriers(shared.matrix_full, shared.matrix_empty, kMatrixWarps, kStateWarps);
    init_barriers(shared.gate_full, shared.gate_empty, 1, kStateWarps);
    mbarrier_init_fence();
    prefetch_tensor_map(&p.q);
    prefetch_tensor_map(&p.k);
    prefetch_tensor_map(&p.v);
    prefetch_tensor_map(&p.o);
  }
  // The blocks of T^T and P on the empty side of the diagonal are never written again.
  auto* zeros = reinterpret_cast<uint4*>(shared.t);
  constexpr int kCount = (sizeof(shared.t) + sizeof(shared.p)) / sizeof(uint4);
  static_assert(offsetof(SharedMemory, p) == offsetof(SharedMemory, t) + sizeof(shared.t));
  for (int i = threadIdx.x; i < kCount; i += kThreads) zeros[i] = {0, 0, 0, 0};
  fence_async_proxy();
  __syncthreads();
}

/// What the warpgroups of one block do for `work`, from 64 `first_half` of V's columns on.
template <typename Element, typename Needs, Roles kRoles = Roles::kAll>
__device__ __forceinline__ void run_roles(const ForwardArguments& p, const Work& work,
                                          const StateEnds& ends, SharedMemory& shared,
                                          int first_half) {
  const int warpgroup = __shfl_sync(0xffffffffU, threadIdx.x / 128, 0);
  const int thread = threadIdx.x % 128;
  if (warpgroup == 0) {
    lower_registers<kLoadRegisters>();
    const int lane = thread % 32;
    if (thread / 32 == 0) {
      for (int c = 0; c < work.chunks; ++c) load_keys(p, work, shared, c, true, lane);
    } else if (thread / 32 == 1) {
      for (int c = 0; c < work.chunks; ++c) {
        load_values<2>(p, work, shared, c, true, first_half, lane);
      }
    } else if (thread / 32 == 2) {
      load_gates(p, work, shared, lane);
    }
  } else if (warpgroup == 1) {
    lower_registers<kMatrixRegisters>();
    if constexpr (kRoles == Roles::kStateOnly) {
      run_idle_matrices(work, shared, thread);
    } else {
      run_chunk_matrices<Element>(p, work, shared, thread);
    }
  } else {
    raise_registers<kStateRegisters>();
    const int local = warpgroup - 2;
    StateScan<Element, SharedMemory, Needs> scan(p, work, shared, first_half + local, local,
                                                 thread);
    if constexpr (kRoles == Roles::kMatricesOnly) {
      scan.run_idle();
    } else {
      scan.run(ends);
    }
  }
}

template <typename Element, typename Needs, Roles kRoles = Roles::kAll>
__global__ void __launch_bounds__(kThreads, 1)
    gated_delta_rule_forward_kernel(const __grid_constant__ ForwardArguments p) {
  extern __shared__ __align__(1024) uint8_t raw_shared[];
  auto& shared = *reinterpret_cast<SharedMemory*>(raw_shared);
  initialise(shared, p);
  const int slices = (p.V + kHeadDim - 1) / kHeadDim;
  const int head = blockIdx.x / slices;
  const Work work(p, head / p.HV, head % p.HV);
  run_roles<Element, Needs, kRoles>(p, work, problem_ends(p, work), shared,
                                    blockIdx.x % slices * 2);
}

}  // namespace gdn::kernels::cuda::sm90
