// The two scans over the chunks of wide heads: the forward (a block a sequence, value head and one
// or two slices of V) and the backward's replay (a segment instead of a sequence). The blocks of a
// cluster have neighbouring slices of one head: each loads a part of K, Q, T, P for all of them.
#pragma once

#include <gdn/kernels/cuda/sm90/gated_delta_rule/wide_state.cuh>

namespace gdn::kernels::cuda::sm90 {

/// Threads of a block: the loading warpgroup and the state warpgroups.
inline constexpr int wide_threads(int groups) { return 128 * (1 + groups); }
inline constexpr int kWideStateRegisters = 240;  // of two state warpgroups

// The loading role, a warp each; 24 registers leave no room for more in one.

/// K, and in the forward Q: every block of the cluster loads its share of the tiles for all.
template <WidePass kPass, int kGroups, int kTiles>
__device__ void load_wide_keys(const WideArguments& p, const Work& work,
                               WideShared<kPass, kGroups, kTiles>& shared, int lane) {
  using Shared = WideShared<kPass, kGroups, kTiles>;
  const int size = static_cast<int>(cluster_size());
  for (int c = 0; c < work.chunks; ++c) {
    const auto key = slot(shared.key_full, c);
    const uint32_t keys = shared_address(shared.keys[key.stage]);
    const uint32_t full = shared_address(&shared.key_full[key.stage]);
    const int tokens = work.tokens(c);
    mbarrier_wait(shared_address(&shared.key_empty[key.stage]), key.parity ^ 1);
    if (tokens == kChunk) {
      if (lane != 0) continue;
      const auto all = static_cast<uint16_t>((1U << size) - 1);
      const int token = static_cast<int>(work.begin) + c * kChunk;
      mbarrier_arrive_expect(full, sizeof(shared.keys[0]));
      for (int tile = static_cast<int>(cluster_rank()); tile < kTiles; tile += size) {
        const uint32_t to = keys + tile * Shared::kKeyTileBytes;
        const int x = tile * kHalf;
        tma_load_multicast(to, &p.k, full, all, x, work.key_head, token, work.batch);
        if constexpr (!Shared::kReplay) {
          tma_load_multicast(to + kHalfTileBytes, &p.q, full, all, x, work.key_head, token,
                             work.batch);
        }
      }
    } else {
      const auto load = [&](const ConstView4& view, uint32_t to) {
        const uint16_t* rows = element(view, work, work.key_head, int64_t{c} * kChunk);
#pragma unroll 1
        for (int tile = 0; tile < kTiles; ++tile) {
          load_ragged_tile<1>(to + tile * Shared::kKeyTileBytes, rows + tile * kHalf, view.stride_t,
                              tokens, lane, p.K - tile * kHalf);
        }
      };
      load(p.k_view, keys);
      if constexpr (!Shared::kReplay) load(p.q_view, keys + kHalfTileBytes);
      fence_async_proxy();
      __syncwarp();
      if (lane == 0) mbarrier_arrive(full);
    }
  }
}

/// T and, in the forward, P, likewise; one lane.
template <WidePass kPass, int kGroups, int kTiles>
__device__ void load_wide_matrices(const WideArguments& p, const Work& work, int64_t first_chunk,
                                   WideShared<kPass, kGroups, kTiles>& shared) {
  const uint32_t size = cluster_size();
  const auto all = static_cast<uint16_t>((1U << size) - 1);
  const uint32_t bytes = sizeof(shared.matrices[0]) / size;
  const uint32_t offset = cluster_rank() * bytes;
  for (int c = 0; c < work.chunks; ++c) {
    const auto matrix = slot(shared.matrix_full, c);
    const uint32_t full = shared_address(&shared.matrix_full[matrix.stage]);
    mbarrier_wait(shared_address(&shared.matrix_empty[matrix.stage]), matrix.parity ^ 1);
    mbarrier_arrive_expect(full, sizeof(shared.matrices[0]));
    bulk_load_multicast(shared_address(shared.matrices[matrix.stage]) + offset,
                        p.matrices_of(first_chunk + c, work.value_head) + offset, bytes, full, all);
  }
}

template <WidePass kPass, int kGroups, int kTiles>
__device__ void load_wide_values(const WideArguments& p, const Work& work, int first_slice,
                                 WideShared<kPass, kGroups, kTiles>& shared, int lane) {
  for (int c = 0; c < work.chunks; ++c) {
    const auto value = slot(shared.value_full, c);
    const uint32_t full = shared_address(&shared.value_full[value.stage]);
    const int tokens = work.tokens(c);
    mbarrier_wait(shared_address(&shared.value_empty[value.stage]), value.parity ^ 1);
    if (tokens == kChunk) {
      if (lane != 0) continue;
      mbarrier_arrive_expect(full, sizeof(shared.v[0]));
      for (int group = 0; group < kGroups; ++group) {
        tma_load(shared_address(shared.v[value.stage][group]), &p.v, full,
                 (first_slice + group) * kSlice, work.value_head,
                 static_cast<int>(work.begin) + c * kChunk, work.batch);
      }
    } else {
      const uint16_t* rows = element(p.v_view, work, work.value_head, int64_t{c} * kChunk);
      for (int group = 0; group < kGroups; ++group) {
        const int x = (first_slice + group) * kSlice;
        load_ragged_tile<1>(shared_address(shared.v[value.stage][group]), rows + x,
                            p.v_view.stride_t, tokens, lane, p.V - x);
      }
      __syncwarp();
      if (lane == 0) mbarrier_arrive(full);
    }
  }
}

template <WidePass kPass, int kGroups, int kTiles>
__device__ void initialise(WideShared<kPass, kGroups, kTiles>& shared, const WideArguments& p) {
  constexpr int kStateWarps = 4 * kGroups;
  const int cluster_warps = kStateWarps * static_cast<int>(cluster_size());
  if (threadIdx.x == 0) {
    init_barriers(shared.key_full, shared.key_empty, 1, cluster_warps);
    init_barriers(shared.matrix_full, shared.matrix_empty, 1, cluster_warps);
    init_barriers(shared.value_full, shared.value_empty, 1, kStateWarps);
    init_barriers(shared.gate_full, shared.gate_empty, 1, kStateWarps);
    mbarrier_init_fence();
    prefetch_tensor_map(&p.q);
    prefetch_tensor_map(&p.k);
    prefetch_tensor_map(&p.v);
  }
  cluster_sync();
}

/// The roles of a block. run(scan) runs the state role.
template <typename Element, WidePass kPass, int kGroups, int kTiles, typename Arguments,
          typename Run>
__device__ __forceinline__ void run_wide_roles(const Arguments& p, const Work& work,
                                               int64_t first_chunk, int first_slice,
                                               WideShared<kPass, kGroups, kTiles>& shared,
                                               Run run) {
  initialise(shared, p);
  const int warpgroup = __shfl_sync(0xffffffffU, threadIdx.x / 128, 0);
  const int thread = threadIdx.x % 128;
  if (warpgroup == 0) {
    if constexpr (kGroups == 2) lower_registers<kLoadRegisters>();
    if (thread / 32 == 0) {
      load_wide_keys(p, work, shared, thread);
    } else if (thread / 32 == 1) {
      load_gates(p, work, shared, thread % 32);
    } else if (thread / 32 == 2) {
      load_wide_values(p, work, first_slice, shared, thread % 32);
    } else if (thread == 96) {
      load_wide_matrices(p, work, first_chunk, shared);
    }
  } else {
    if constexpr (kGroups == 2) raise_registers<kWideStateRegisters>();
    const int group = warpgroup - 1;
    WideScan<Element, kPass, kGroups, kTiles> scan(p, work, shared, first_chunk, group,
                                                   first_slice + group);
    run(scan);
  }
  // No block leaves before the others have stopped writing to its shared memory.
  __syncwarp();
  cluster_sync();
}

/// K is at most 64 kTiles.
template <typename Element, int kGroups, int kTiles>
__global__ void __launch_bounds__(wide_threads(kGroups), 1)
    gated_delta_rule_wide_forward_kernel(const __grid_constant__ WideForwardArguments p) {
  extern __shared__ __align__(1024) uint8_t raw_shared[];
  auto& shared = *reinterpret_cast<WideShared<WidePass::kForward, kGroups, kTiles>*>(raw_shared);
  const int lane = threadIdx.x % 32;
  const int parts = (p.slices + kGroups - 1) / kGroups;
  const int head = static_cast<int>(blockIdx.x) / parts;
  const Work work(p, head / p.HV, head % p.HV);
  const int first_chunk = first_piece(p, kChunk, work.sequence, lane);
  const int first_segment = first_piece(p, kSegmentTokens, work.sequence, lane);
  run_wide_roles<Element>(p, work, first_chunk, static_cast<int>(blockIdx.x) % parts * kGroups,
                          shared, [&](auto& scan) { scan.run_forward(first_segment); });
}

/// Whatever K is, S has the four tiles that its readers expect.
template <typename Element, int kGroups>
__global__ void __launch_bounds__(wide_threads(kGroups), 1)
    gated_delta_rule_wide_replay_kernel(const __grid_constant__ WideReplayArguments p) {
  extern __shared__ __align__(1024) uint8_t raw_shared[];
  auto& shared =
      *reinterpret_cast<WideShared<WidePass::kReplay, kGroups, kWideKeyTiles>*>(raw_shared);
  const int lane = threadIdx.x % 32;
  const int parts = (p.slices + kGroups - 1) / kGroups;
  const int head = static_cast<int>(blockIdx.x) / parts;
  const Piece piece = find_piece(p, kSegmentTokens, head / p.HV, lane);
  if (piece.sequence == p.N) return;  // and with it the whole cluster
  Work work(p, piece.sequence, head % p.HV);
  work.narrow(piece.index * kSegmentTokens, kSegmentTokens);
  const int segment_state = first_segment(p, piece.sequence, lane) +
                            static_cast<int>(p.window_begin / kSegmentTokens) + piece.index;
  const int first_chunk =
      first_piece(p, kChunk, piece.sequence, lane) + piece.index * kSegmentChunks;
  run_wide_roles<Element>(p, work, first_chunk, static_cast<int>(blockIdx.x) % parts * kGroups,
                          shared, [&](auto& scan) { scan.run_replay(segment_state); });
}

}  // namespace gdn::kernels::cuda::sm90
