// The state role: two warpgroups carry S from chunk to chunk, each 64 of V's rows of S^T, and write
// O.
//
// S^T [64, K] stays in fp32 registers. With V as the row dimension of every product, each left
// operand is an accumulator of the one before, converted in place (R = V - exp(b) K S):
//   (K S)^T = S^T K^T    U^T = R^T T^T    S'^T = exp(b_C) S^T + (U^T exp(b_C - b)) K
//   O^T = scale exp(b) S^T Q^T + U^T P^T
// Only K, Q, T, P are read from shared memory. The chain from S to S' is issued first; everything
// else is done while a product runs.
#pragma once

#include <gdn/kernels/cuda/sm90/gated_delta_rule/layout.cuh>

namespace gdn::kernels::cuda::sm90 {

/// One warpgroup's 64 rows of S^T: element 4 n + e is row v + 8 (e / 2), column 8 n + k + e % 2.
/// In memory the state is [K, V], or [V, K] with `v_first`.
struct StatePosition {
  int v, k;  // of this thread's first element
  int v_size, k_size;
  int64_t v_stride, k_stride;

  __device__ StatePosition(int half, int thread, bool v_first, int K = kHeadDim, int V = kHeadDim)
      : v(half * kHalf + thread / 32 * 16 + thread % 32 / 4),
        k(2 * (thread % 4)),
        v_size(V),
        k_size(K),
        v_stride(v_first ? K : 1),
        k_stride(v_first ? 1 : V) {}

  /// body(element, offset in memory) for every element that memory has; K is a multiple of 8.
  /// kWhole: it has them all.
  template <bool kWhole = false, typename Body>
  __device__ __forceinline__ void for_each(Body body) const {
    const bool rows[2] = {v < v_size, v + 8 < v_size};
    const int64_t next_row = 8 * v_stride;
    int64_t offset = v * v_stride + k * k_stride;
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (kWhole || (rows[e / 2] && 8 * n < k_size)) {
          body(4 * n + e, offset + (e / 2) * next_row + (e % 2) * k_stride);
        }
      }
      offset += 8 * k_stride;
    }
  }
};

/// A state in memory; data null: none.
template <typename Float>
struct StateView {
  Float* data = nullptr;
  bool v_first = false;
  int K = kHeadDim, V = kHeadDim;
};

/// Where a scan's S comes from (nowhere: zeros, or unit vectors) and goes to, and its segment
/// states.
struct StateEnds {
  StateView<const float> from;
  StateView<float> to;
  bool from_identity = false;
  float* segment_states = nullptr;  // of the sequence, or null
  int first_chunk = 0;              // of the work, in its sequence
};

/// Accumulators [64, 16 kCount] as left operands of kCount products.
template <typename Element, int kCount>
__device__ __forceinline__ void to_operand(const float* accumulators,
                                           uint32_t (&operand)[kCount][4]) {
#pragma unroll
  for (int s = 0; s < kCount; ++s) {
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      operand[s][m] = pack<Element>(accumulators[8 * s + 2 * m], accumulators[8 * s + 2 * m + 1]);
    }
  }
}

/// Where the first segment state of the work's sequence goes; null if none are wanted.
__device__ inline float* sequence_segment_states(const ForwardArguments& p, const Work& work) {
  if (p.segment_states == nullptr) return nullptr;
  int64_t segment = 0;
  for (int n = 0; n < work.sequence; ++n) {
    const int64_t length = p.cu_seqlens != nullptr ? p.cu_seqlens[n + 1] - p.cu_seqlens[n] : p.T;
    segment += (length + kSegmentTokens - 1) / kSegmentTokens;
  }
  return p.segment_states + (segment * p.HV + work.value_head) * (int64_t{p.K} * p.V);
}

/// The whole sequence's ends: those of the problem.
__device__ inline StateEnds problem_ends(const ForwardArguments& p, const Work& work) {
  const int64_t offset = (int64_t{work.sequence} * p.HV + work.value_head) * (int64_t{p.K} * p.V);
  StateEnds ends;
  if (p.initial_state != nullptr) {
    ends.from = {p.initial_state + offset, p.state_v_first, p.K, p.V};
  }
  if (p.final_state != nullptr) ends.to = {p.final_state + offset, p.state_v_first, p.K, p.V};
  ends.segment_states = sequence_segment_states(p, work);
  return ends;
}

/// accumulators[64 x 64] = operand[64 x 128] tile^T, tile the [64 tokens, 128] of K or Q.
template <typename Element>
__device__ __forceinline__ void multiply_by_tile(float (&accumulators)[32],
                                                 uint32_t (&operand)[8][4], uint32_t tile) {
  const uint64_t descriptor = swizzled_tile(tile);
#pragma unroll
  for (int s = 0; s < 8; ++s) {
    const uint32_t offset = (s / 4) * kHalfTileBytes + (s % 4) * 32;
    wgmma<Element, 64>(accumulators, operand[s], advance(descriptor, offset), s > 0);
  }
}

/// This lane's row for a 16 x 16 block of tokens (rows) and V (columns) of a [64, 64] tile of V or
/// O whose four matrices, transposed, are in an accumulator's order.
__device__ __forceinline__ uint32_t token_row(uint32_t tile, int token_block, int v_block,
                                              int lane) {
  const int matrix = lane / 8;
  return tile + swizzled(16 * token_block + 8 * (matrix / 2) + lane % 8, 2 * v_block + matrix % 2);
}

/// [tokens, 64 of V] from `packed`, [64 of V, tokens], to a tile in shared memory.
__device__ __forceinline__ void stage_tokens(const uint32_t (&packed)[4][4], uint32_t tile,
                                             int thread) {
#pragma unroll
  for (int s = 0; s < 4; ++s) {
    store_matrices_transposed(token_row(tile, s, thread / 32, thread % 32), packed[s][0],
                              packed[s][1], packed[s][2], packed[s][3]);
  }
}

/// Meets the threads of a state warpgroup, once every store that it queued before has read its
/// tile: after two such meetings a tile may be filled again.
__device__ __forceinline__ void state_sync_after_stores(int local, int thread) {
  if (thread == 0) tma_store_wait_read<0>();
  local == 0 ? named_barrier_sync(kStateBarrier, 128) : named_barrier_sync(kStateBarrier + 1, 128);
}

/// Writes O, or what has its shape, [tokens, 64 of V], from `packed`, through shared memory.
/// `local` is the warpgroup's number among those of its block; `width` is V. kLast: the chunk may
/// be its sequence's last, with fewer tokens.
template <bool kLast = true>
__device__ __forceinline__ void store_output(const CUtensorMap* map, const MutableView4& view,
                                             const Work& work, const uint32_t (&packed)[4][4],
                                             uint32_t tile, int chunk, int half, int local,
                                             int thread, int width = kHeadDim) {
  stage_tokens(packed, tile, thread);
  fence_async_proxy();
  state_sync_after_stores(local, thread);
  const int tokens = kLast ? work.tokens(chunk) : kChunk;
  if (tokens == kChunk) {
    if (thread == 0) {
      tma_store(map, tile, half * kHalf, work.value_head,
                static_cast<int>(work.begin) + chunk * kChunk, work.batch);
      tma_store_commit();
    }
  } else {
    auto* out = static_cast<uint16_t*>(view.data) + work.batch * view.stride_b +
                (work.begin + int64_t{chunk} * kChunk) * view.stride_t +
                work.value_head * view.stride_h + half * kHalf;
    if (half * kHalf + thread % 8 * 8 >= width) return;
    for (int row = thread / 8; row < tokens; row += 16) {
      const uint4 x = load_16_bytes(tile + swizzled(row, thread % 8));
      *reinterpret_cast<uint4*>(out + row * view.stride_t + thread % 8 * 8) = x;
    }
  }
}

/// What a scan is for: O and the states, or the state at its end alone.
enum class Scan { kOutputs, kEnd };

/// What a scan must be ready for. What it need not be shortens its loop, and the roles of a
/// multiprocessor compete for its instruction cache (docs/hopper.md).
struct AnySizes {
  static constexpr bool kWhole = false;    // K = V = 128
  static constexpr bool kSegments = true;  // states every kSegmentTokens may be wanted
};
struct WholeHeads {
  static constexpr bool kWhole = true;
  static constexpr bool kSegments = false;
};
struct WholeHeadsAndSegments {
  static constexpr bool kWhole = true;
  static constexpr bool kSegments = true;
};

/// What one warpgroup carries from chunk to chunk. `half` says which 64 rows of S^T it has, `local`
/// which of the block's warpgroups it is.
template <typename Element, typename Shared, typename Needs, Scan kScan = Scan::kOutputs>
struct StateScan {
  static constexpr bool kOutputs = kScan == Scan::kOutputs;
  // Where registers allow it, O is written under the next chunk's first products, so that nothing
  // but P U stands between S' and those.
  static constexpr bool kLateOutput = kOutputs && Shared::kLateOutput;
  const ForwardArguments& p;
  const Work& work;
  Shared& shared;
  int half, local, thread, warp, lane, column;
  float s[64];  // S^T
  float a[32];  // (K S)^T, then U^T
  float o[32];  // (Q S)^T, then O^T
  uint32_t u_operand[4][4];

  __device__ __forceinline__ StateScan(const ForwardArguments& p, const Work& work, Shared& shared,
                                       int half, int local, int thread)
      : p(p),
        work(work),
        shared(shared),
        half(half),
        local(local),
        thread(thread),
        warp(thread / 32),
        lane(thread % 32),
        column(2 * (thread % 4)) {}

  __device__ __forceinline__ void release(uint64_t& barrier) const {
    __syncwarp();
    if (lane == 0) mbarrier_arrive(shared_address(&barrier));
  }

  /// From S at the chunk's start to U in `a` and scale exp(b) Q S in `o`; S decayed. Before that O
  /// of the chunk before, whose P U may be in flight, is written.
  template <bool kFirst>
  __device__ __forceinline__ void begin(int c) {
    const auto key = slot(shared.key_full, c);
    const auto value = slot(shared.value_full, c);
    const auto matrix = slot(shared.matrix_full, c);
    const auto gate = slot(shared.gate_full, c);
    mbarrier_wait(shared_address(&shared.key_full[key.stage]), key.parity);
    uint32_t s_operand[8][4];
    to_operand<Element>(s, s_operand);
    if constexpr (kFirst) decay_state(gate);
    pin(a);
    wgmma_fence();
    multiply_by_tile<Element>(a, s_operand, shared_address(shared.k[key.stage]));
    wgmma_commit();
    if constexpr (kOutputs) {
      uint32_t packed[4][4];
      if constexpr (kLateOutput && !kFirst) finish_output<1>(c - 1, packed);
      pin(o);
      wgmma_fence();
      multiply_by_tile<Element>(o, s_operand, shared_address(shared.q[key.stage]));
      wgmma_commit();
      if constexpr (kLateOutput && !kFirst) write_output<false>(c - 1, packed);
    }
    if constexpr (!kFirst) decay_state(gate);

    // R = V - exp(b) K S.
    const GateVectors& gates = shared.gates[gate.stage];
    mbarrier_wait(shared_address(&shared.value_full[value.stage]), value.parity);
    const uint32_t v_tile = shared_address(shared.v[value.stage]) + local * kHalfTileBytes;
    wgmma_wait<kOutputs ? 1 : 0>();
    pin(a);
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
    // R's operand takes the registers of S's, which Q S reads.
    wgmma_wait<0>();
    if constexpr (kOutputs) pin(o);
    pin(s_operand);
    uint32_t r_operand[4][4];
    to_operand<Element>(a, r_operand);

    // U = T R; meanwhile scale Q S.
    mbarrier_wait(shared_address(&shared.matrix_full[matrix.stage]), matrix.parity);
    const uint64_t t_tile = swizzled_tile(shared.t_tile(matrix.stage));
    pin(a);
    wgmma_fence();
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      wgmma<Element, 64, Major::kOuter>(a, r_operand[j], advance(t_tile, j * 16 * 128), j > 0);
    }
    wgmma_commit();
    if constexpr (kOutputs) scale_columns(o, gates.from_start_scaled);
    wgmma_wait<0>();
    pin(a);
    pin(r_operand);
    if constexpr (!kOutputs) release(shared.matrix_empty[matrix.stage]);
  }

  /// S' = exp(b_C) S + K^T (exp(b_C - b) U), and O += P U, in flight on return.
  template <bool kLast>
  __device__ __forceinline__ void complete(int c) {
    const auto key = slot(shared.key_full, c);
    const auto matrix = slot(shared.matrix_full, c);
    const auto gate = slot(shared.gate_full, c);
    if constexpr (kOutputs && !kLateOutput) multiply_by_p(matrix.stage);
    uint32_t decayed_operand[4][4];  // exp(b_C - b) U
    const float* to_end = shared.gates[gate.stage].to_end;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const float2 factor = *reinterpret_cast<const float2*>(&to_end[16 * j + 8 * n + column]);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int e = 8 * j + 4 * n + 2 * r;
          decayed_operand[j][2 * n + r] = pack<Element>(a[e] * factor.x, a[e + 1] * factor.y);
        }
      }
    }
    release(shared.gate_empty[gate.stage]);
    const uint64_t k_columns = swizzled_tile(shared_address(shared.k[key.stage]), kHalfTileBytes);
    pin(s);
    wgmma_fence();
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      wgmma<Element, 128, Major::kOuter>(s, decayed_operand[j], advance(k_columns, j * 16 * 128),
                                         1);
    }
    wgmma_commit();
    if constexpr (kLateOutput) multiply_by_p(matrix.stage);
    if constexpr (kOutputs && !kLateOutput) {
      uint32_t packed[4][4];
      finish_output<1>(c, packed);
      write_output<kLast>(c, packed);
    }
    wgmma_wait<kLateOutput ? 1 : 0>();
    pin(s);
    pin(decayed_operand);
    release(shared.key_empty[key.stage]);
  }

  /// O += P U.
  __device__ __forceinline__ void multiply_by_p(int matrix_stage) {
    to_operand<Element>(a, u_operand);
    const uint64_t p_tile = swizzled_tile(shared.p_tile(matrix_stage));
    pin(o);
    wgmma_fence();
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      wgmma<Element, 64>(o, u_operand[j], advance(p_tile, j * 32), 1);
    }
    wgmma_commit();
  }

  /// O of chunk c as operands' dtype, once all but the last kPending groups of products are done.
  template <int kPending>
  __device__ __forceinline__ void finish_output(int c, uint32_t (&packed)[4][4]) {
    wgmma_wait<kPending>();
    pin(o);
    pin(u_operand);
    release(shared.matrix_empty[slot(shared.matrix_full, c).stage]);
    to_operand<Element>(o, packed);
  }

  template <bool kLast>
  __device__ __forceinline__ void write_output(int c, const uint32_t (&packed)[4][4]) {
    store_output<kLast>(&p.o, p.o_view, work, packed,
                        shared_address(shared.o[c % kOutputStages]) + local * kHalfTileBytes, c,
                        half, local, thread, Needs::kWhole ? kHeadDim : p.V);
  }

  __device__ __forceinline__ void run(const StateEnds& ends) {
    load_state(ends);
    if (work.chunks > 0) {
      const auto keep_state = [&](int c) {
        if constexpr (kOutputs && Needs::kSegments) {
          const int chunk = ends.first_chunk + c;
          if (ends.segment_states == nullptr || chunk % kSegmentChunks != 0) return;
          const int K = Needs::kWhole ? kHeadDim : p.K;
          const int V = Needs::kWhole ? kHeadDim : p.V;
          float* state = ends.segment_states + chunk / kSegmentChunks * p.HV * (int64_t{K} * V);
          store_state({state, false, K, V});
        }
      };
      // The second half of a chunk shares its iteration with the first half of the next, and no
      // product is in flight where the loop closes: the compiler waits for every product before a
      // use of S unless it sees S completed in the same iteration.
      keep_state(0);
      begin<true>(0);
      for (int c = 1; c < work.chunks; ++c) {
        complete<false>(c - 1);
        keep_state(c);
        begin<false>(c);
      }
      complete<true>(work.chunks - 1);
      if constexpr (kLateOutput) {
        uint32_t packed[4][4];
        finish_output<0>(work.chunks - 1, packed);
        write_output<true>(work.chunks - 1, packed);
      }
    }
    if (ends.to.data != nullptr) store_state(ends.to);
    // The copy engine may still be reading this block's shared memory.
    if (thread == 0) tma_store_wait_read<0>();
  }

  /// Keeps the barriers going without the work, for a measurement of the matrix role alone.
  __device__ void run_idle() {
    for (int c = 0; c < work.chunks; ++c) {
      const auto matrix = slot(shared.matrix_full, c);
      const auto value = slot(shared.value_full, c);
      mbarrier_wait(shared_address(&shared.value_full[value.stage]), value.parity);
      mbarrier_wait(shared_address(&shared.matrix_full[matrix.stage]), matrix.parity);
      release(shared.value_empty[value.stage]);
      release(shared.key_empty[slot(shared.key_full, c).stage]);
      release(shared.gate_empty[slot(shared.gate_full, c).stage]);
      release(shared.matrix_empty[matrix.stage]);
    }
  }

 private:
  __device__ __forceinline__ void load_state(const StateEnds& ends) {
    const StatePosition at(half, thread, ends.from.v_first, ends.from.K, ends.from.V);
#pragma unroll
    for (int i = 0; i < 64; ++i) {
      const bool diagonal = at.v + 8 * (i / 2 % 2) == at.k + 8 * (i / 4) + i % 2;
      s[i] = ends.from_identity && diagonal ? 1.0F : 0.0F;
    }
    if (ends.from.data == nullptr) return;
    at.for_each<Needs::kWhole>([&](int i, int64_t offset) { s[i] = ends.from.data[offset]; });
  }

  __device__ __forceinline__ void store_state(const StateView<float>& to) const {
    StatePosition(half, thread, to.v_first, to.K, to.V)
        .for_each<Needs::kWhole>([&](int i, int64_t offset) { to.data[offset] = s[i]; });
  }

  /// S becomes exp(b_C) S.
  __device__ __forceinline__ void decay_state(const Slot<kGateStages>& gate) {
    mbarrier_wait(shared_address(&shared.gate_full[gate.stage]), gate.parity);
    const float decay = shared.gates[gate.stage].from_start[kChunk - 1];
#pragma unroll
    for (int i = 0; i < 64; ++i) s[i] *= decay;
  }

  __device__ __forceinline__ void scale_columns(float (&accumulators)[32],
                                                const float* factors) const {
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
};

}  // namespace gdn::kernels::cuda::sm90
