// The backward's scan for wide heads: from the last chunk to the first, dS of every chunk's end,
// and dV. The products are those of backward_scan.cuh, the way of holding 64 rows of dS^T (64 of V,
// K = 256) that of wide_state.cuh:
// - dS' is converted 64 columns at a time, into one of two buffers of 16 registers; a piece goes to
//   scratch memory while it is multiplied by K.
// - One accumulator serves K dS' and P^T dO, one after the other: two do not fit.
// The blocks of a cluster have neighbouring slices of one head: each loads a part of K, Q, T, P for
// all of them.
#pragma once

#include <gdn/kernels/cuda/sm90/gated_delta_rule/warp_stores.cuh>
#include <gdn/kernels/cuda/sm90/gated_delta_rule/wide_backward.cuh>
#include <gdn/kernels/cuda/sm90/gated_delta_rule/wide_scan.cuh>

namespace gdn::kernels::cuda::sm90 {

/// kGroups slices of V in a block.
template <int kGroups>
struct WideBackwardScanShared {
  static constexpr int kStages = 2;
  alignas(1024) uint8_t k[kStages][kWideKeyBytes];
  alignas(1024) uint8_t q[kStages][kWideKeyBytes];
  alignas(1024) uint8_t d_o[kStages][kGroups][kHalfTileBytes];
  alignas(1024) uint8_t matrices[kStages][kWideMatricesBytes];
  alignas(1024) uint8_t out[kGroups][4][kWarpStoreBytes];
  GateVectors gates[kGateStages];
  alignas(8) uint64_t full[kStages], empty[kStages];
  uint64_t gate_full[kGateStages], gate_empty[kGateStages];
};

/// The work's chunks from the last to the first: step i is chunk chunks - 1 - i. One warp.
template <int kGroups>
__device__ void load_wide_backward_tiles(const WideBackwardArguments& p, const Work& work,
                                         int64_t first_chunk, int first_slice,
                                         WideBackwardScanShared<kGroups>& shared, int lane) {
  const int rank = static_cast<int>(cluster_rank());
  const int size = static_cast<int>(cluster_size());
  const auto all = static_cast<uint16_t>((1U << size) - 1);
  for (int i = 0; i < work.chunks; ++i) {
    const int c = work.chunks - 1 - i;
    const auto stage = slot(shared.full, i);
    const uint32_t k = shared_address(shared.k[stage.stage]);
    const uint32_t q = shared_address(shared.q[stage.stage]);
    const uint32_t d_o = shared_address(shared.d_o[stage.stage]);
    const uint32_t full = shared_address(&shared.full[stage.stage]);
    mbarrier_wait(shared_address(&shared.empty[stage.stage]), stage.parity ^ 1);
    const int tokens = work.tokens(c);
    if (tokens == kChunk) {
      const int token = static_cast<int>(work.begin) + c * kChunk;
      if (lane == 0) {
        mbarrier_arrive_expect(full,
                               2 * kWideKeyBytes + kWideMatricesBytes + kGroups * kHalfTileBytes);
        for (int tile = rank; tile < kWideKeyTiles; tile += size) {
          const uint32_t offset = tile * kHalfTileBytes;
          tma_load_multicast(k + offset, &p.k, full, all, tile * kHalf, work.key_head, token,
                             work.batch);
          tma_load_multicast(q + offset, &p.q, full, all, tile * kHalf, work.key_head, token,
                             work.batch);
        }
        for (int group = 0; group < kGroups; ++group) {
          tma_load(d_o + group * kHalfTileBytes, &p.d_o, full, (first_slice + group) * kSlice,
                   work.value_head, token, work.batch);
        }
      }
    } else {
      const int64_t token = int64_t{c} * kChunk;
      for (int tile = 0; tile < kWideKeyTiles; ++tile) {
        const int x = tile * kHalf;
        load_ragged_tile<1>(k + tile * kHalfTileBytes,
                            element(p.k_view, work, work.key_head, token) + x, p.k_view.stride_t,
                            tokens, lane, p.K - x);
        load_ragged_tile<1>(q + tile * kHalfTileBytes,
                            element(p.q_view, work, work.key_head, token) + x, p.q_view.stride_t,
                            tokens, lane, p.K - x);
      }
      for (int group = 0; group < kGroups; ++group) {
        const int x = (first_slice + group) * kSlice;
        load_ragged_tile<1>(d_o + group * kHalfTileBytes,
                            element(p.d_o_view, work, work.value_head, token) + x,
                            p.d_o_view.stride_t, tokens, lane, p.V - x);
      }
      fence_async_proxy();
      __syncwarp();
      if (lane == 0) mbarrier_arrive_expect(full, kWideMatricesBytes);
    }
    if (lane == 0) {
      const int bytes = kWideMatricesBytes / size;
      bulk_load_multicast(shared_address(shared.matrices[stage.stage]) + rank * bytes,
                          p.matrices_of(first_chunk + c, work.value_head) + rank * bytes, bytes,
                          full, all);
    }
  }
}

template <int kGroups>
__device__ void load_wide_backward_gates(const WideBackwardArguments& p, const Work& work,
                                         WideBackwardScanShared<kGroups>& shared, int lane) {
  for (int i = 0; i < work.chunks; ++i) {
    const auto gate = slot(shared.gate_full, i);
    store_gates(fetch_gates(p, work, work.chunks - 1 - i, lane), p.scale, shared.gates[gate.stage],
                shared_address(&shared.gate_empty[gate.stage]), gate.parity ^ 1, lane);
    if (lane == 0) mbarrier_arrive(shared_address(&shared.gate_full[gate.stage]));
  }
}

/// Which thread of its warpgroup this is. Read anew in every half of a chunk: else the compiler
/// keeps whatever depends on it over the loop, and there are no registers for that.
struct ScanThread {
  int thread, warp, lane, column;
  __device__ __forceinline__ ScanThread() {
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    thread %= 128;
    warp = thread / 32;
    lane = thread % 32;
    column = 2 * (thread % 4);
  }
};

/// One warpgroup's part: the 64 rows of dS^T of one slice of V. `group` is its number in the block.
template <typename Element, int kGroups>
struct WideGradientScan {
  const WideBackwardArguments& p;
  const Work& work;
  WideBackwardScanShared<kGroups>& shared;
  int64_t first_chunk;  // of the work, among those of all sequences
  int group, slice;
  float s[kWideKeys / 2];  // dS^T
  float a[32];             // (K dS')^T, then dU^T, then dV^T

  __device__ __forceinline__ WideGradientScan(const WideBackwardArguments& p, const Work& work,
                                              WideBackwardScanShared<kGroups>& shared,
                                              int64_t first_chunk, int group, int slice)
      : p(p), work(work), shared(shared), first_chunk(first_chunk), group(group), slice(slice) {}

  /// Step i: from dS', the chunk's end, to beta dU in `a`; dS' is written, then decayed.
  template <bool kFirst>
  __device__ __forceinline__ void begin(int i) {
    const ScanThread at;
    const auto stage = slot(shared.full, i);
    const auto gate = slot(shared.gate_full, i);
    const GateVectors& gates = shared.gates[gate.stage];
    const uint64_t keys = swizzled_tile(shared_address(shared.k[stage.stage]));
    const uint64_t p_tile =
        swizzled_tile(shared_address(shared.matrices[stage.stage]) + kMatrixBytes);
    mbarrier_wait(shared_address(&shared.gate_full[gate.stage]), gate.parity);
    const float decay = gates.from_start[kChunk - 1];
    mbarrier_wait(shared_address(&shared.full[stage.stage]), stage.parity);
    uint8_t* state =  // this warp's rows
        p.d_s + p.entry(first_chunk + chunk_of(i), work.value_head, slice) * kWideStateBytes +
        at.warp * kWarpStoreBytes;
    uint32_t operand[2][4][4];  // 64 columns of dS'^T each
#pragma unroll
    for (int piece = 0; piece < kWideKeyTiles; ++piece) {
      uint32_t(&part)[4][4] = operand[piece % 2];
      // Where dS' is not completed in the same iteration, the compiler lets no product be in flight
      // while it is touched.
      if (piece >= (kFirst ? 1 : 2)) {
        wgmma_wait<kFirst ? 0 : 1>();
        pin(part);
      }
      float* columns = s + 32 * piece;
      to_operand<Element>(columns, part);
#pragma unroll
      for (int e = 0; e < 32; ++e) columns[e] *= decay;
      if (piece == 0) pin(a);
      wgmma_fence();
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        wgmma<Element, 64>(a, part[j], advance(keys, piece * kHalfTileBytes + j * 32),
                           piece + j > 0);
      }
      wgmma_commit();
      store_rows(part, 0, staged(at), state + piece * kHalfTileBytes, at.lane, slice < p.slices);
    }
    wgmma_wait<0>();
    pin(a);
    pin(operand[0]);
    pin(operand[1]);
    uint32_t d_o[4][4];
    load_d_o(d_o, stage.stage, at);
    scale_tokens(a, gates.to_end, at.column);
    pin(a);
    wgmma_fence();
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      wgmma<Element, 64, Major::kOuter>(a, d_o[j], advance(p_tile, j * 16 * 128), 1);
    }
    wgmma_commit();
    wgmma_wait<0>();
    pin(a);
    pin(d_o);
    scale_tokens(a, gates.beta, at.column);
  }

  /// From there to dS, the chunk's start; dV is written meanwhile.
  __device__ __forceinline__ void complete(int i) {
    const ScanThread at;
    const auto stage = slot(shared.full, i);
    const auto gate = slot(shared.gate_full, i);
    const GateVectors& gates = shared.gates[gate.stage];
    const uint64_t t_tile = swizzled_tile(shared_address(shared.matrices[stage.stage]));
    const uint64_t q_columns = swizzled_tile(shared_address(shared.q[stage.stage]), kHalfTileBytes);
    const uint64_t k_columns = swizzled_tile(shared_address(shared.k[stage.stage]), kHalfTileBytes);
    uint32_t d_u_operand[4][4];
    to_operand<Element>(a, d_u_operand);
    pin(a);
    wgmma_fence();
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      wgmma<Element, 64>(a, d_u_operand[j], advance(t_tile, j * 32), j > 0);
    }
    wgmma_commit();
    uint32_t d_o[4][4];
    load_d_o(d_o, stage.stage, at);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        const float2 factor = pair(gates.from_start_scaled, 2 * j + m / 2, at);
        const float2 x = unpack<Element>(d_o[j][m]);
        d_o[j][m] = pack<Element>(factor.x * x.x, factor.y * x.y);
      }
    }
    pin(s);
    add_to_state(d_o, q_columns);
    wgmma_wait<1>();
    pin(a);
    pin(d_u_operand);
    uint32_t decayed_operand[4][4];  // -exp(b) dV
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        const float2 decay = pair(gates.from_start, 2 * j + m / 2, at);
        const int e = 8 * j + 2 * m;
        decayed_operand[j][m] = pack<Element>(-decay.x * a[e], -decay.y * a[e + 1]);
      }
    }
    add_to_state(decayed_operand, k_columns);
    release(shared.gate_empty[gate.stage], at.lane);
    store_d_v(chunk_of(i), at);
    wgmma_wait<0>();
    pin(s);
    pin(d_o);
    pin(decayed_operand);
    __syncwarp();
    if (at.lane < static_cast<int>(cluster_size())) {
      mbarrier_arrive_at(shared_address(&shared.empty[stage.stage]), at.lane);
    }
  }

  __device__ __forceinline__ void run() {
    const WindowEnds ends = window_ends(p, work);
#pragma unroll
    for (float& x : s) x = 0.0F;
    if (ends.from != nullptr) {
      for_each_of_state<kWideKeyTiles>(p, ends.from, slice, ScanThread().thread, p.state_v_first,
                                       [&](int i, const float* memory) { s[i] = *memory; });
    }
    if (work.chunks > 0) {
      // As in StateScan::run: a chunk's second half shares its iteration with the next one's first.
      begin<true>(0);
      for (int i = 1; i < work.chunks; ++i) {
        complete(i - 1);
        begin<false>(i);
      }
      complete(work.chunks - 1);
    }
    if (ends.to != nullptr) {
      for_each_of_state<kWideKeyTiles>(p, ends.to, slice, ScanThread().thread, p.state_v_first,
                                       [&](int i, float* memory) { *memory = s[i]; });
    }
  }

 private:
  __device__ __forceinline__ int chunk_of(int i) const { return work.chunks - 1 - i; }

  /// This thread's two of a vector's tokens 8 n to 8 n + 7.
  __device__ __forceinline__ float2 pair(const float* vector, int n, const ScanThread& at) const {
    return *reinterpret_cast<const float2*>(&vector[8 * n + at.column]);
  }

  /// This slice's dO^T as left operands.
  __device__ __forceinline__ void load_d_o(uint32_t (&d_o)[4][4], int stage,
                                           const ScanThread& at) const {
    const uint32_t tile = shared_address(shared.d_o[stage][group]);
#pragma unroll
    for (int block = 0; block < 4; ++block) {
      load_matrices_transposed(d_o[block], token_row(tile, block, at.warp, at.lane));
    }
  }

  /// dS^T += operand [64 of V, 64 tokens] times the chunk's K or Q; in flight on return.
  __device__ __forceinline__ void add_to_state(const uint32_t (&operand)[4][4], uint64_t columns) {
    wgmma_fence();
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int half = 0; half < kWideHalves; ++half) {
        wgmma<Element, 128, Major::kOuter>(s + 64 * half, operand[j],
                                           advance(columns, j * 16 * 128 + half * kTileBytes), 1);
      }
    }
    wgmma_commit();
  }

  __device__ __forceinline__ uint32_t staged(const ScanThread& at) const {
    return shared_address(shared.out[group][at.warp]);
  }

  /// dV from `a`: this warp's 16 of V.
  __device__ __forceinline__ void store_d_v(int c, const ScanThread& at) const {
    uint32_t packed[4][4];
    to_operand<Element>(a, packed);
    const int first = slice * kSlice + 16 * at.warp;  // of V
    auto* out = static_cast<uint16_t*>(p.d_v_view.data) + work.batch * p.d_v_view.stride_b +
                (work.begin + int64_t{c} * kChunk) * p.d_v_view.stride_t +
                work.value_head * p.d_v_view.stride_h + first;
    store_tokens(packed, staged(at), work.tokens(c), p.V - first, at.lane,
                 [&](int token) { return out + token * p.d_v_view.stride_t; });
  }
};

/// One block a sequence, value head and kGroups slices of V.
template <typename Element, int kGroups>
__global__ void __launch_bounds__(wide_threads(kGroups), 1)
    gated_delta_rule_wide_backward_scan_kernel(const __grid_constant__ WideBackwardArguments p) {
  extern __shared__ __align__(1024) uint8_t raw_shared[];
  auto& shared = *reinterpret_cast<WideBackwardScanShared<kGroups>*>(raw_shared);
  const int parts = (p.slices + kGroups - 1) / kGroups;
  const int head = static_cast<int>(blockIdx.x) / parts;
  const int first_slice = static_cast<int>(blockIdx.x) % parts * kGroups;
  const Work work(p, head / p.HV, head % p.HV);
  if (absent(p, work)) return;  // and with it the whole cluster
  const int first_chunk = first_piece(p, kChunk, work.sequence, threadIdx.x % 32);
  if (threadIdx.x == 0) {
    constexpr int kWarps = 4 * kGroups;
    init_barriers(shared.full, shared.empty, 1, kWarps * static_cast<int>(cluster_size()));
    init_barriers(shared.gate_full, shared.gate_empty, 1, kWarps);
    mbarrier_init_fence();
    prefetch_tensor_map(&p.q);
    prefetch_tensor_map(&p.k);
    prefetch_tensor_map(&p.d_o);
  }
  cluster_sync();
  const int warpgroup = __shfl_sync(0xffffffffU, threadIdx.x / 128, 0);
  const int thread = threadIdx.x % 128;
  if (warpgroup == 0) {
    if constexpr (kGroups == 2) lower_registers<kLoadRegisters>();
    if (thread / 32 == 0) {
      load_wide_backward_tiles(p, work, first_chunk, first_slice, shared, thread);
    } else if (thread / 32 == 1) {
      load_wide_backward_gates(p, work, shared, thread % 32);
    }
  } else {
    if constexpr (kGroups == 2) raise_registers<kWideStateRegisters>();
    const int group = warpgroup - 1;
    WideGradientScan<Element, kGroups>(p, work, shared, first_chunk, group, first_slice + group)
        .run();
  }
  // No block leaves before the others have stopped writing to its shared memory.
  __syncwarp();
  cluster_sync();
}

}  // namespace gdn::kernels::cuda::sm90
