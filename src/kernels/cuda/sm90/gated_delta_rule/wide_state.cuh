// The state role for wide heads: each warpgroup carries 64 rows of S^T (64 of V, K to 256) from
// chunk to chunk in up to 128 registers a thread. The products are those of state.cuh; what
// differs:
// - S is converted 16 columns at a time, into one of three buffers of 4 registers: all of it as an
//   operand (64) would not fit. K S and Q S read each piece together.
// - The replay (for the backward: U is U^ = U / beta in it) leaves out Q S and P U, and writes S^T
//   and U^ of every chunk.
#pragma once

#include <gdn/kernels/cuda/sm90/cluster.cuh>
#include <gdn/kernels/cuda/sm90/gated_delta_rule/chunk_matrices.cuh>
#include <gdn/kernels/cuda/sm90/gated_delta_rule/state.cuh>
#include <gdn/kernels/cuda/sm90/gated_delta_rule/wide_layout.cuh>

namespace gdn::kernels::cuda::sm90 {

enum class WidePass { kForward, kReplay };

struct WideForwardArguments : WideArguments {
  CUtensorMap o;  // [B, T, HV, V]
  MutableView4 o_view;
  const float* initial_state;  // [N, HV, K, V] or null
  float* final_state;          // [N, HV, K, V] or null
  float* segment_states;       // [segments, HV, K, V] or null
};

/// Shared memory of a block with kGroups state warpgroups, K in kTiles tiles of 64.
template <WidePass kPass, int kGroups, int kTiles>
struct WideShared {
  static constexpr bool kReplay = kPass == WidePass::kReplay;
  /// From one 64 of K to the next: the tile of K and, in the forward, that of Q.
  static constexpr int kKeyTileBytes = kReplay ? kHalfTileBytes : 2 * kHalfTileBytes;
  static constexpr int kKeyStages = kReplay ? 3 : 2;
  static constexpr int kMatrixPairBytes = kReplay ? kMatrixBytes : kWideMatricesBytes;
  /// On their way out, of each warpgroup: O of two chunks; U^, then S^T.
  static constexpr int kOutBytes =
      kReplay ? kWideWritesBytes + kWideStateBytes : 2 * kHalfTileBytes;

  alignas(1024) uint8_t keys[kKeyStages][kTiles * kKeyTileBytes];
  alignas(1024) uint8_t v[1][kGroups][kHalfTileBytes];  // freed early in its chunk
  alignas(1024) uint8_t out[kGroups][kOutBytes];
  alignas(1024) uint8_t matrices[2][kMatrixPairBytes];  // T^T, P
  GateVectors gates[kGateStages];
  alignas(8) uint64_t key_full[kKeyStages], key_empty[kKeyStages];
  uint64_t value_full[1], value_empty[1];
  uint64_t matrix_full[2], matrix_empty[2];
  uint64_t gate_full[kGateStages], gate_empty[kGateStages];
};

/// Calls body(element, memory) for every element of a warpgroup's rows of S^T that the problem has,
/// memory being its place in the [K, V] (or [V, K]) state at `state`. Element 4 n + e is row
/// v + 8 (e / 2), column 8 n + k + e % 2 of S^T.
template <int kTiles, typename Number, typename Body>
__device__ __forceinline__ void for_each_of_state(const WideArguments& p, Number* state, int slice,
                                                  int thread, bool v_first, Body body) {
  const int v = slice * kSlice + thread / 32 * 16 + thread % 32 / 4;
  const int k = 2 * (thread % 4);
  const int64_t v_stride = v_first ? p.K : 1;
  const int64_t k_stride = v_first ? 1 : p.V;
  Number* row = state + v * v_stride + k * k_stride;
#pragma unroll
  for (int n = 0; n < kTiles * kHalf / 8; ++n) {
    if (8 * n < p.K) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (v + 8 * (e / 2) < p.V) body(4 * n + e, row + 8 * (e / 2) * v_stride + e % 2 * k_stride);
      }
    }
    row += 8 * k_stride;
    // Else the addresses of all n are made at once, and S has to leave its registers.
    asm volatile("" : "+l"(row));
  }
}

/// Multiplies the columns (tokens) of accumulators [64, 64] by `factors`.
__device__ __forceinline__ void scale_tokens(float* accumulators, const float* factors,
                                             int column) {
#pragma unroll
  for (int n = 0; n < kChunk / 8; ++n) {
    const float2 factor = *reinterpret_cast<const float2*>(&factors[8 * n + column]);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      accumulators[4 * n + 2 * r] *= factor.x;
      accumulators[4 * n + 2 * r + 1] *= factor.y;
    }
  }
}

template <typename Element, WidePass kPass, int kGroups, int kTiles>
struct WideScan {
  using Shared = WideShared<kPass, kGroups, kTiles>;
  using Arguments = std::conditional_t<Shared::kReplay, WideReplayArguments, WideForwardArguments>;
  static constexpr bool kReplay = Shared::kReplay;
  static constexpr int kKeys = kTiles * kHalf;
  static_assert(kTiles % 2 == 0, "S is completed 128 columns at a time");
  static constexpr int kSteps = kKeys / 16;  // pieces of S^T, 16 columns each
  static constexpr int kPieces = 3;          // that are operands at a time

  const Arguments& p;
  const Work& work;
  Shared& shared;
  int64_t first_chunk;  // of the work, among those of all sequences
  int group, slice;
  float s[kKeys / 2];         // S^T
  float a[32];                // (K S)^T, then U^T
  float o[kReplay ? 1 : 32];  // (Q S)^T, then O^T

  __device__ __forceinline__ WideScan(const Arguments& p, const Work& work, Shared& shared,
                                      int64_t first_chunk, int group, int slice)
      : p(p), work(work), shared(shared), first_chunk(first_chunk), group(group), slice(slice) {}

  /// The thread's number in its warpgroup, read anew: else the compiler keeps every address that
  /// depends on it over the loop, and there is no register for them.
  static __device__ __forceinline__ int this_thread() {
    int thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    return thread % 128;
  }

  /// Frees a buffer that this block alone fills.
  __device__ __forceinline__ void release(uint64_t& barrier) const {
    __syncwarp();
    if (this_thread() % 32 == 0) mbarrier_arrive(shared_address(&barrier));
  }
  /// Frees a buffer that every block of the cluster fills a part of.
  __device__ __forceinline__ void release_to_cluster(uint64_t& barrier) const {
    __syncwarp();
    const uint32_t lane = this_thread() % 32;
    if (lane < cluster_size()) mbarrier_arrive_at(shared_address(&barrier), lane);
  }

  __device__ __forceinline__ uint32_t out_tile() const { return shared_address(shared.out[group]); }

  /// Waits for what the first products of chunk c read.
  __device__ __forceinline__ void wait_for_keys(int c) const {
    const auto key = slot(shared.key_full, c);
    const auto gate = slot(shared.gate_full, c);
    mbarrier_wait(shared_address(&shared.gate_full[gate.stage]), gate.parity);
    mbarrier_wait(shared_address(&shared.key_full[key.stage]), key.parity);
  }

  /// From S to U in `a` (forward: and scale exp(b) Q S in `o`), S decayed.
  template <bool kFirst>
  __device__ __forceinline__ void begin(int c) {
    const auto key = slot(shared.key_full, c);
    const auto value = slot(shared.value_full, c);
    const auto matrix = slot(shared.matrix_full, c);
    const auto gate = slot(shared.gate_full, c);
    const GateVectors& gates = shared.gates[gate.stage];
    const float decay = gates.from_start[kChunk - 1];
    const int thread = this_thread();
    const int warp = thread / 32;
    const int lane = thread % 32;
    const int column = 2 * (thread % 4);
    const uint64_t keys = swizzled_tile(shared_address(shared.keys[key.stage]));
    uint32_t operand[kPieces][4];
    pin(a);
    pin(o);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t(&piece)[4] = operand[step % kPieces];
      // Where S is not completed in the same iteration, the compiler lets no product be in flight
      // while S is touched.
      if (step >= kPieces || (kFirst && step > 0)) {
        wgmma_wait<kFirst ? 0 : kPieces - 1>();
        pin(piece);
      }
      float* columns = s + 8 * step;
      pin_columns(columns);
#pragma unroll
      for (int m = 0; m < 4; ++m) piece[m] = pack<Element>(columns[2 * m], columns[2 * m + 1]);
      wgmma_fence();
      const uint32_t offset = step / 4 * Shared::kKeyTileBytes + step % 4 * 32;
      wgmma<Element, 64>(a, piece, advance(keys, offset), step > 0);
      if constexpr (!kReplay) {
        wgmma<Element, 64>(o, piece, advance(keys, kHalfTileBytes + offset), step > 0);
      }
      wgmma_commit();
      if constexpr (kReplay) {
        const uint32_t tile = out_tile() + kWideWritesBytes + step / 4 * kHalfTileBytes;
        store_matrices(block_row(tile, warp, step % 4, lane), piece[0], piece[1], piece[2],
                       piece[3]);
      }
    }
    if constexpr (kReplay) {
      const int64_t entry = p.entry(first_chunk + c, work.value_head, slice);
      store_out(p.s + entry * kWideStateBytes, kWideStateBytes, out_tile() + kWideWritesBytes);
    }

    mbarrier_wait(shared_address(&shared.value_full[value.stage]), value.parity);
    const uint32_t v_tile = shared_address(shared.v[value.stage][group]);
    uint32_t v[4][4];
#pragma unroll
    for (int block = 0; block < 4; ++block) {
      load_matrices_transposed(v[block], token_row(v_tile, block, warp, lane));
    }
    wgmma_wait<0>();
    pin(a);
    pin(o);
    pin(operand);
    uint32_t r_operand[4][4];  // R = V - exp(b) K S
#pragma unroll
    for (int block = 0; block < 4; ++block) {
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const float2 factor =
            *reinterpret_cast<const float2*>(&gates.from_start[16 * block + 8 * n + column]);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const float2 v_pair = unpack<Element>(v[block][2 * n + r]);
          const int i = 8 * block + 4 * n + 2 * r;
          r_operand[block][2 * n + r] =
              pack<Element>(v_pair.x - factor.x * a[i], v_pair.y - factor.y * a[i + 1]);
        }
      }
    }
    release(shared.value_empty[value.stage]);

    // U = T R; meanwhile S decays, and Q S is scaled.
    const auto wait_for_matrices = [&] {
      mbarrier_wait(shared_address(&shared.matrix_full[matrix.stage]), matrix.parity);
    };
    wait_for_matrices();
    const uint64_t t_tile = swizzled_tile(shared_address(shared.matrices[matrix.stage]));
    pin(a);
    wgmma_fence();
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      wgmma<Element, 64, Major::kOuter>(a, r_operand[j], advance(t_tile, j * 16 * 128), j > 0);
    }
    wgmma_commit();
    if constexpr (kFirst) wgmma_wait<0>();
    // Over already. The compiler moves no work across a wait: without this one it would issue what
    // follows before T R, with the tensor cores idle.
    wait_for_matrices();
#pragma unroll
    for (int i = 0; i < kKeys / 2; ++i) s[i] *= decay;
    if constexpr (!kReplay) scale_tokens(o, gates.from_start_scaled, column);
    pin(s);
    pin(o);
    wait_for_matrices();
    wgmma_wait<0>();
    pin(a);
    pin(r_operand);
    if constexpr (kReplay) release_to_cluster(shared.matrix_empty[matrix.stage]);
  }

  /// O += P U, then S' = exp(b_C) S + K^T (exp(b_C - b) U); O or U^ is written meanwhile.
  template <bool kLast>
  __device__ __forceinline__ void complete(int c) {
    const auto key = slot(shared.key_full, c);
    const auto matrix = slot(shared.matrix_full, c);
    const auto gate = slot(shared.gate_full, c);
    const GateVectors& gates = shared.gates[gate.stage];
    const int thread = this_thread();
    const int column = 2 * (thread % 4);
    uint32_t u_operand[4][4];
    to_operand<Element>(a, u_operand);
    if constexpr (!kReplay) {
      const uint64_t p_tile =
          swizzled_tile(shared_address(shared.matrices[matrix.stage]) + kMatrixBytes);
      pin(o);
      wgmma_fence();
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        wgmma<Element, 64>(o, u_operand[j], advance(p_tile, j * 32), 1);
      }
      wgmma_commit();
      // As in begin(): P U is issued first.
      mbarrier_wait(shared_address(&shared.matrix_full[matrix.stage]), matrix.parity);
    }
    uint32_t decayed_operand[4][4];
    scale_tokens(a, kReplay ? gates.written : gates.to_end, column);
    release(shared.gate_empty[gate.stage]);
    to_operand<Element>(a, decayed_operand);
    const uint64_t k_columns =
        swizzled_tile(shared_address(shared.keys[key.stage]), Shared::kKeyTileBytes);
    pin(s);
    wgmma_fence();
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int half = 0; half < kTiles / 2; ++half) {
        wgmma<Element, 128, Major::kOuter>(
            s + 64 * half, decayed_operand[j],
            advance(k_columns, j * 16 * 128 + half * 2 * Shared::kKeyTileBytes), 1);
      }
    }
    wgmma_commit();
    if constexpr (kReplay) {
      stage_tokens(u_operand, out_tile(), thread);
      const int64_t entry = p.entry(first_chunk + c, work.value_head, slice);
      store_out(p.u + entry * kWideWritesBytes, kWideWritesBytes, out_tile());
    } else {
      wgmma_wait<1>();
      pin(o);
      pin(u_operand);
      release_to_cluster(shared.matrix_empty[matrix.stage]);
      uint32_t packed[4][4];
      to_operand<Element>(o, packed);
      store_output(&p.o, p.o_view, work, packed, out_tile() + c % 2 * kHalfTileBytes, c, slice,
                   group, thread, p.V);
    }
    if constexpr (!kLast) wait_for_keys(c + 1);
    wgmma_wait<0>();
    pin(s);
    pin(decayed_operand);
    release_to_cluster(shared.key_empty[key.stage]);
  }

  /// A chunk's second half shares its iteration with the first half of the next, as in
  /// StateScan::run. between(c): with S at the start of chunk c complete.
  template <typename Between>
  __device__ __forceinline__ void run_chunks(Between between) {
    between(0);
    wait_for_keys(0);
    begin<true>(0);
    for (int c = 1; c < work.chunks; ++c) {
      complete<false>(c - 1);
      between(c);
      begin<false>(c);
    }
    complete<true>(work.chunks - 1);
  }

  /// The forward; `first_segment` is the sequence's first among all.
  __device__ __forceinline__ void run_forward(int64_t first_segment) {
    const int64_t state_size = int64_t{p.K} * p.V;
    const int64_t head = int64_t{work.sequence} * p.HV + work.value_head;
    clear();
    if (p.initial_state != nullptr) {
      const float* state = p.initial_state + head * state_size;
      for_each_of_state<kTiles>(p, state, slice, this_thread(), p.state_v_first,
                                [&](int i, const float* memory) { s[i] = *memory; });
    }
    if (work.chunks > 0) {
      run_chunks([&](int c) {
        if (p.segment_states == nullptr || c % kSegmentChunks != 0) return;
        float* state = p.segment_states +
                       ((first_segment + c / kSegmentChunks) * p.HV + work.value_head) * state_size;
        for_each_of_state<kTiles>(p, state, slice, this_thread(), false,
                                  [&](int i, float* memory) { *memory = s[i]; });
      });
    }
    if (p.final_state != nullptr) {
      float* state = p.final_state + head * state_size;
      for_each_of_state<kTiles>(p, state, slice, this_thread(), p.state_v_first,
                                [&](int i, float* memory) { *memory = s[i]; });
    }
    // The copy engine may still be reading this block's shared memory.
    if (this_thread() == 0) tma_store_wait_read<0>();
  }

  /// The replay of one segment.
  __device__ __forceinline__ void run_replay(int64_t segment) {
    const float* state =
        p.segment_states + (segment * p.all_heads + work.value_head) * (int64_t{p.K} * p.V);
    clear();
    for_each_of_state<kTiles>(p, state, slice, this_thread(), false,
                              [&](int i, const float* memory) { s[i] = *memory; });
    run_chunks([](int) {});
    if (this_thread() == 0) tma_store_wait_read<0>();
  }

 private:
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kKeys / 2; ++i) s[i] = 0.0F;
  }

  __device__ __forceinline__ void pin_columns(float* columns) const {
#pragma unroll
    for (int i = 0; i < 8; ++i) asm volatile("" : "+f"(columns[i])::"memory");
  }

  /// Copies a staged tile to scratch memory, where the slice exists.
  __device__ __forceinline__ void store_out(uint8_t* to, int bytes, uint32_t tile) const {
    const int thread = this_thread();
    fence_async_proxy();
    state_sync_after_stores(group, thread);
    if (thread == 0 && slice < p.slices) {
      bulk_store(to, tile, bytes);
      tma_store_commit();
    }
  }
};

}  // namespace gdn::kernels::cuda::sm90
