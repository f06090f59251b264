// The replay: from the state that the forward kept at a segment's start, the states at the starts
// of its chunks, with what else the other two kernels need of them. The forward's roles without
// O: one block a segment and value head.
#pragma once

#include <gdn/kernels/cuda/sm90/gated_delta_rule/backward.cuh>
#include <gdn/kernels/cuda/sm90/gated_delta_rule/chunk_matrices.cuh>
#include <gdn/kernels/cuda/sm90/gated_delta_rule/loads.cuh>
#include <gdn/kernels/cuda/sm90/gated_delta_rule/state.cuh>

namespace gdn::kernels::cuda::sm90 {

struct ReplayShared {
  static constexpr int kKeyStages = 3;
  static constexpr int kValueStages = 1;  // freed early in its chunk
  alignas(1024) uint8_t k[kKeyStages][kTileBytes];
  alignas(1024) uint8_t q[kKeyStages][kTileBytes];
  alignas(1024) uint8_t v[kValueStages][kTileBytes];
  alignas(1024) uint8_t s[2][kStateHalfBytes];  // on their way out: S^T, a half each warpgroup
  alignas(1024) uint8_t u[kWritesBytes];        // U^
  alignas(1024) uint8_t matrices[kMatrixStages][kMatricesBytes];
  __half a[2][kChunk * kHalfRow];
  alignas(16) float diagonal[4][16 * kDiagonalColumn];
  GateVectors gates[kGateStages];
  alignas(8) uint64_t key_full[kKeyStages], key_empty[kKeyStages];
  uint64_t value_full[kValueStages], value_empty[kValueStages];
  uint64_t matrix_full[kMatrixStages], matrix_empty[kMatrixStages];
  uint64_t gate_full[kGateStages], gate_empty[kGateStages];

  __device__ __forceinline__ uint32_t t_tile(int stage) const {
    return shared_address(matrices[stage]);
  }
  __device__ __forceinline__ uint32_t p_tile(int stage) const {
    return shared_address(matrices[stage]) + kMatrixBytes;
  }
};

/// Copies T^T and P of every chunk to scratch memory; one lane.
__device__ inline void store_matrices_of_chunks(const BackwardArguments& p, const Work& work,
                                                int64_t first_chunk, ReplayShared& shared) {
  for (int c = 0; c < work.chunks; ++c) {
    const auto matrix = slot(shared.matrix_full, c);
    mbarrier_wait(shared_address(&shared.matrix_full[matrix.stage]), matrix.parity);
    bulk_store(p.matrices + p.entry(first_chunk + c, work.value_head) * kMatricesBytes,
               shared_address(shared.matrices[matrix.stage]), kMatricesBytes);
    tma_store_commit();
    tma_store_wait_read<0>();
    mbarrier_arrive(shared_address(&shared.matrix_empty[matrix.stage]));
  }
}

/// A state warpgroup's 64 rows of S^T, from operands of a product, to a tile in shared memory.
__device__ __forceinline__ void stage_state(const uint32_t (&operand)[8][4], uint32_t tile,
                                            int warp, int lane) {
#pragma unroll
  for (int s = 0; s < 8; ++s) {
    store_matrices(block_row(tile + (s / 4) * kHalfTileBytes, warp, s % 4, lane), operand[s][0],
                   operand[s][1], operand[s][2], operand[s][3]);
  }
}

/// One warpgroup's part of the replay: 64 rows of S^T, as in StateScan.
template <typename Element>
struct ReplayScan {
  const BackwardArguments& p;
  const Work& work;
  int64_t first_chunk;
  ReplayShared& shared;
  int half, thread, warp, lane, column;
  float s[64];  // S^T
  float a[32];  // (K S)^T, then U^^T

  __device__ __forceinline__ ReplayScan(const BackwardArguments& p, const Work& work,
                                        int64_t first_chunk, ReplayShared& shared, int half,
                                        int thread)
      : p(p),
        work(work),
        first_chunk(first_chunk),
        shared(shared),
        half(half),
        thread(thread),
        warp(thread / 32),
        lane(thread % 32),
        column(2 * (thread % 4)) {}

  __device__ __forceinline__ void release(uint64_t& barrier) const {
    __syncwarp();
    if (lane == 0) mbarrier_arrive(shared_address(&barrier));
  }

  /// From S to U^ in `a`; S decayed.
  template <bool kFirst>
  __device__ __forceinline__ void begin(int c) {
    const auto key = slot(shared.key_full, c);
    const auto value = slot(shared.value_full, c);
    const auto matrix = slot(shared.matrix_full, c);
    const auto gate = slot(shared.gate_full, c);
    mbarrier_wait(shared_address(&shared.key_full[key.stage]), key.parity);
    mbarrier_wait(shared_address(&shared.gate_full[gate.stage]), gate.parity);
    const GateVectors& gates = shared.gates[gate.stage];
    uint32_t s_operand[8][4];
    to_operand<Element>(s, s_operand);
    if constexpr (kFirst) decay_state(gates);
    pin(a);
    wgmma_fence();
    multiply_by_tile<Element>(a, s_operand, shared_address(shared.k[key.stage]));
    wgmma_commit();

    stage_state(s_operand, shared_address(shared.s[half]), warp, lane);
    fence_async_proxy();
    state_sync_after_stores(half, thread);
    if (thread == 0) {
      bulk_store(
          p.s + p.entry(first_chunk + c, work.value_head) * kStateBytes + half * kStateHalfBytes,
          shared_address(shared.s[half]), kStateHalfBytes);
      tma_store_commit();
    }
    if constexpr (!kFirst) decay_state(gates);

    // R = V - exp(b) K S.
    mbarrier_wait(shared_address(&shared.value_full[value.stage]), value.parity);
    const uint32_t v_tile = shared_address(shared.v[value.stage]) + half * kHalfTileBytes;
    wgmma_wait<0>();
    pin(a);
    pin(s_operand);
#pragma unroll
    for (int block = 0; block < 4; ++block) {
      uint32_t v[4];
      load_matrices_transposed(v, token_row(v_tile, block, warp, lane));
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const float2 decay =
            *reinterpret_cast<const float2*>(&gates.from_start[16 * block + 8 * n + column]);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const float2 v_pair = unpack<Element>(v[2 * n + r]);
          const int i = 8 * block + 4 * n + 2 * r;
          a[i] = v_pair.x - decay.x * a[i];
          a[i + 1] = v_pair.y - decay.y * a[i + 1];
        }
      }
    }
    release(shared.value_empty[value.stage]);
    uint32_t r_operand[4][4];
    to_operand<Element>(a, r_operand);
    mbarrier_wait(shared_address(&shared.matrix_full[matrix.stage]), matrix.parity);
    const uint64_t t_tile = swizzled_tile(shared.t_tile(matrix.stage));
    pin(a);
    wgmma_fence();
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      wgmma<Element, 64, Major::kOuter>(a, r_operand[j], advance(t_tile, j * 16 * 128), j > 0);
    }
    wgmma_commit();
    wgmma_wait<0>();
    pin(a);
    pin(r_operand);
    release(shared.matrix_empty[matrix.stage]);
  }

  /// S' = exp(b_C) S + K^T (exp(b_C - b) beta U^); U^ is written meanwhile.
  __device__ __forceinline__ void complete(int c) {
    const auto key = slot(shared.key_full, c);
    const auto gate = slot(shared.gate_full, c);
    const GateVectors& gates = shared.gates[gate.stage];
    uint32_t packed[4][4];
    uint32_t decayed_operand[4][4];
    to_operand<Element>(a, packed);
#pragma unroll
    for (int n = 0; n < kChunk / 8; ++n) {
      const float2 written = *reinterpret_cast<const float2*>(&gates.written[8 * n + column]);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        a[4 * n + 2 * r] *= written.x;
        a[4 * n + 2 * r + 1] *= written.y;
      }
    }
    release(shared.gate_empty[gate.stage]);
    to_operand<Element>(a, decayed_operand);
    const uint64_t k_columns = swizzled_tile(shared_address(shared.k[key.stage]), kHalfTileBytes);
    pin(s);
    wgmma_fence();
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      wgmma<Element, 128, Major::kOuter>(s, decayed_operand[j], advance(k_columns, j * 16 * 128),
                                         1);
    }
    wgmma_commit();
    const uint32_t u_tile = shared_address(shared.u) + half * kHalfTileBytes;
    stage_tokens(packed, u_tile, thread);
    fence_async_proxy();
    state_sync_after_stores(half, thread);
    if (thread == 0) {
      bulk_store(
          p.u + p.entry(first_chunk + c, work.value_head) * kWritesBytes + half * kHalfTileBytes,
          u_tile, kHalfTileBytes);
      tma_store_commit();
    }
    wgmma_wait<0>();
    pin(s);
    pin(decayed_operand);
    release(shared.key_empty[key.stage]);
  }

  __device__ __forceinline__ void run(int64_t segment) {
    const float* state = p.segment_states + (segment * p.all_heads + work.value_head) * kStateSize;
    StatePosition(half, thread, false).for_each([&](int i, int64_t offset) {
      s[i] = state[offset];
    });
    // As in StateScan::run: a chunk's second half shares its iteration with the next one's first.
    begin<true>(0);
    for (int c = 1; c < work.chunks; ++c) {
      complete(c - 1);
      begin<false>(c);
    }
    complete(work.chunks - 1);
    if (thread == 0) tma_store_wait_read<0>();
  }

 private:
  __device__ __forceinline__ void decay_state(const GateVectors& gates) {
    const float decay = gates.from_start[kChunk - 1];
#pragma unroll
    for (int i = 0; i < 64; ++i) s[i] *= decay;
  }
};

__device__ inline void initialise(ReplayShared& shared, const BackwardArguments& p) {
  constexpr int kStateWarps = 8;
  constexpr int kMatrixWarps = 4;
  if (threadIdx.x == 0) {
    init_barriers(shared.key_full, shared.key_empty, 1, kStateWarps);
    init_barriers(shared.value_full, shared.value_empty, 1, kStateWarps);
    init_barriers(shared.matrix_full, shared.matrix_empty, kMatrixWarps, kStateWarps + 1);
    init_barriers(shared.gate_full, shared.gate_empty, 1, kStateWarps);
    mbarrier_init_fence();
    prefetch_tensor_map(&p.q);
    prefetch_tensor_map(&p.k);
    prefetch_tensor_map(&p.v);
  }
  // The blocks of T^T and P on the empty side of the diagonal are never written again.
  auto* zeros = reinterpret_cast<uint4*>(shared.matrices);
  constexpr int kCount = sizeof(shared.matrices) / sizeof(uint4);
  for (int i = threadIdx.x; i < kCount; i += kThreads) zeros[i] = {0, 0, 0, 0};
  fence_async_proxy();
  __syncthreads();
}

template <typename Element>
__global__ void __launch_bounds__(kThreads, 1)
    gated_delta_rule_replay_kernel(const __grid_constant__ BackwardArguments p) {
  extern __shared__ __align__(1024) uint8_t raw_shared[];
  auto& shared = *reinterpret_cast<ReplayShared*>(raw_shared);
  const int thread = threadIdx.x % 128;
  const int lane = thread % 32;
  const Piece piece = find_piece(p, kSegmentTokens, blockIdx.x / p.HV, lane);
  if (piece.sequence == p.N) return;
  initialise(shared, p);
  Work work(p, piece.sequence, blockIdx.x % p.HV);
  work.narrow(piece.index * kSegmentTokens, kSegmentTokens);
  const int first_chunk =
      first_piece(p, kChunk, piece.sequence, lane) + piece.index * kSegmentChunks;
  const int segment_state = first_segment(p, piece.sequence, lane) +
                            static_cast<int>(p.window_begin / kSegmentTokens) + piece.index;
  const int warpgroup = __shfl_sync(0xffffffffU, threadIdx.x / 128, 0);
  if (warpgroup == 0) {
    lower_registers<kLoadRegisters>();
    if (thread / 32 == 0) {
      load_tiles(p, work, shared, lane);
    } else if (thread / 32 == 1) {
      load_gates(p, work, shared, lane);
    } else if (thread == 64) {
      store_matrices_of_chunks(p, work, first_chunk, shared);
    }
  } else if (warpgroup == 1) {
    lower_registers<kMatrixRegisters>();
    run_chunk_matrices<Element, Beta::kOfColumn>(p, work, shared, thread);
  } else {
    raise_registers<kStateRegisters>();
    ReplayScan<Element>(p, work, first_chunk, shared, warpgroup - 2, thread).run(segment_state);
  }
}

}  // namespace gdn::kernels::cuda::sm90
