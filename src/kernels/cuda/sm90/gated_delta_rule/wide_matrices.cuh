// T and P of every chunk of wide heads, chunks in parallel: one block a chunk and key head, its
// value heads in turn. chunk_matrices.cuh has the mathematics.
#pragma once

#include <gdn/kernels/cuda/sm90/gated_delta_rule/chunk_matrices.cuh>
#include <gdn/kernels/cuda/sm90/gated_delta_rule/wide_layout.cuh>

namespace gdn::kernels::cuda::sm90 {

inline constexpr int kWideMatricesThreads = 128;
inline constexpr int kWideMatricesBlocks = 3;  // a multiprocessor: they hide each other's latencies

struct WideMatricesShared {
  struct Inverse {
    alignas(1024) uint8_t t[kMatrixBytes];
    alignas(1024) uint8_t p[kMatrixBytes];
    __half a[kChunk * kHalfRow];
    alignas(16) float diagonal[4][16 * kDiagonalColumn];
  };
  union {
    alignas(1024) uint8_t rows[2][kWideKeyBytes];  // K, Q
    Inverse inverse;                               // once both products are in registers
  };
  GateVectors gates;
  alignas(8) uint64_t full;
  uint64_t gates_empty;  // never used: the threads of the block meet instead
};

/// Fills K and Q of a chunk; on return they are there for this thread.
__device__ __forceinline__ void load_rows(const WideArguments& p, const Work& work, int chunk,
                                          WideMatricesShared& shared, const Fragment& at) {
  const uint32_t k = shared_address(shared.rows[0]);
  const uint32_t q = shared_address(shared.rows[1]);
  const uint32_t full = shared_address(&shared.full);
  const int tokens = work.tokens(chunk);
  if (tokens == kChunk) {
    if (threadIdx.x == 0) {
      mbarrier_arrive_expect(full, 2 * kWideKeyBytes);
      const int token = static_cast<int>(work.begin) + chunk * kChunk;
      for (int tile = 0; tile < kWideKeyTiles; ++tile) {
        const uint32_t offset = tile * kHalfTileBytes;
        tma_load(k + offset, &p.k, full, tile * kHalf, work.key_head, token, work.batch);
        tma_load(q + offset, &p.q, full, tile * kHalf, work.key_head, token, work.batch);
      }
    }
    mbarrier_wait(full, 0);
  } else {
    const int64_t token = int64_t{chunk} * kChunk;
    const int x = at.warp * kHalf;
    const uint32_t offset = at.warp * kHalfTileBytes;
    static_assert(kWideKeyTiles == kWideMatricesThreads / 32);
    load_ragged_tile<1>(k + offset, element(p.k_view, work, work.key_head, token) + x,
                        p.k_view.stride_t, tokens, at.lane, p.K - x);
    load_ragged_tile<1>(q + offset, element(p.q_view, work, work.key_head, token) + x,
                        p.q_view.stride_t, tokens, at.lane, p.K - x);
    fence_async_proxy();
    __syncthreads();
  }
}

template <typename Element, Beta kBeta>
__global__ void __launch_bounds__(kWideMatricesThreads, kWideMatricesBlocks)
    gated_delta_rule_wide_matrices_kernel(const __grid_constant__ WideArguments p) {
  extern __shared__ __align__(1024) uint8_t raw_shared[];
  auto& shared = *reinterpret_cast<WideMatricesShared*>(raw_shared);
  const Fragment at(static_cast<int>(threadIdx.x));
  const int chunk = static_cast<int>(blockIdx.x) / p.H;
  const Piece piece = find_piece(p, kChunk, chunk, at.lane);
  if (piece.sequence == p.N) return;
  const int heads = p.HV / p.H;
  Work work(p, piece.sequence, static_cast<int>(blockIdx.x) % p.H * heads);
  GatePair gates = fetch_gates(p, work, piece.index, at.lane);
  if (threadIdx.x == 0) {
    mbarrier_init(shared_address(&shared.full), 1);
    mbarrier_init(shared_address(&shared.gates_empty), 1);
    mbarrier_init_fence();
  }
  __syncthreads();
  load_rows(p, work, piece.index, shared, at);

  float kk[32];
  float qk[32];
  const uint64_t k = swizzled_tile(shared_address(shared.rows[0]));
  const uint64_t q = swizzled_tile(shared_address(shared.rows[1]));
  pin(kk);
  pin(qk);
  wgmma_fence();
#pragma unroll
  for (int s = 0; s < kWideKeys / 16; ++s) {
    const uint32_t offset = (s / 4) * kHalfTileBytes + (s % 4) * 32;
    wgmma<Element, 64>(kk, advance(k, offset), advance(k, offset), s > 0);
    wgmma<Element, 64>(qk, advance(q, offset), advance(k, offset), s > 0);
  }
  wgmma_commit();
  wgmma_wait<0>();
  pin(kk);
  pin(qk);
  __syncthreads();

  WideMatricesShared::Inverse& inverse = shared.inverse;
  const uint32_t t_tile = shared_address(inverse.t);
  const uint32_t p_tile = shared_address(inverse.p);
  // The blocks of T^T and P on the empty side of the diagonal are never written again.
  for (int block = 0; block < 4; ++block) {
    if (block == at.warp) continue;
    store_matrices(block_row(block < at.warp ? t_tile : p_tile, at.warp, block, at.lane), 0, 0, 0,
                   0);
  }
  for (int head = 0; head < heads; ++head) {
    if (at.warp == 0) {
      store_gates(gates, p.scale, shared.gates, shared_address(&shared.gates_empty), 1, at.lane);
    }
    if (threadIdx.x == 0) tma_store_wait_read<0>();
    __syncthreads();
    const int value_head = work.value_head++;
    if (head + 1 < heads) gates = fetch_gates(p, work, piece.index, at.lane);
    float* diagonal = inverse.diagonal[at.warp];
    for_warp(at.warp, [&](auto warp) {
      store_a<kBeta, warp>(kk, shared.gates, inverse.a, diagonal, at);
      __syncwarp();
      store_p<Element, warp>(qk, shared.gates, p.scale, p_tile, at);
    });
    invert_diagonal(diagonal, inverse.a + 16 * at.warp * (kHalfRow + 1), at.lane);
    __syncthreads();
    for_warp(at.warp, [&](auto warp) {
      multiply_out<Element, kBeta, warp>(inverse.a, shared.gates, t_tile, at);
    });
    fence_async_proxy();
    __syncthreads();
    if (threadIdx.x == 0) {
      bulk_store(p.matrices_of(chunk, value_head), t_tile, kWideMatricesBytes);
      tma_store_commit();
    }
  }
  if (threadIdx.x == 0) tma_store_wait_read<0>();
}

}  // namespace gdn::kernels::cuda::sm90
