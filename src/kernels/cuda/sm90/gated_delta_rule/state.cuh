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
struct StatePosition {
  int v, k;  // of this thread's first element
  int64_t v_stride, k_stride;

  __device__ StatePosition(int half, int thread, bool v_first)
      : v(half * kHalf + thread / 32 * 16 + thread % 32 / 4),
        k(2 * (thread % 4)),
        v_stride(v_first ? kHeadDim : 1),
        k_stride(v_first ? 1 : kHeadDim) {}

  template <typename Body>
  __device__ __forceinline__ void for_each(Body body) const {
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        body(4 * n + e, (v + 8 * (e / 2)) * v_stride + (8 * n + k + e % 2) * k_stride);
      }
    }
  }
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

/// Where the work's first segment state goes; null if none are wanted.
__device__ inline float* first_segment_state(const ForwardArguments& p, const Work& work) {
  if (p.segment_states == nullptr) return nullptr;
  int64_t segment = 0;
  for (int n = 0; n < work.sequence; ++n) {
    const int64_t length = p.cu_seqlens != nullptr ? p.cu_seqlens[n + 1] - p.cu_seqlens[n] : p.T;
    segment += (length + kSegmentTokens - 1) / kSegmentTokens;
  }
  return p.segment_states + (segment * p.HV + work.value_head) * kStateSize;
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
/// `local` is the warpgroup's number among those of its block; `width` is V.
__device__ __forceinline__ void store_output(const CUtensorMap* map, const MutableView4& view,
                                             const Work& work, const uint32_t (&packed)[4][4],
                                             uint32_t tile, int chunk, int half, int local,
                                             int thread, int width = kHeadDim) {
  stage_tokens(packed, tile, thread);
  fence_async_proxy();
  state_sync_after_stores(local, thread);
  const int tokens = work.tokens(chunk);
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

/// What one warpgroup carries from chunk to chunk. `half` says which rows of S^T it has.
template <typename Element>
struct StateScan {
  const ForwardArguments& p;
  const Work& work;
  SharedMemory& shared;
  int half, thread, warp, lane, column;
  float s[64];  // S^T
  float a[32];  // (K S)^T, then U^T
  float o[32];  // (Q S)^T, then O^T

  __device__ __forceinline__ StateScan(const ForwardArguments& p, const Work& work,
                                       SharedMemory& shared, int half, int thread)
      : p(p),
        work(work),
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

  /// From S to U in `a` and scale exp(b) Q S in `o`, S decayed.
  template <bool kFirst>
  __device__ __forceinline__ void begin(int c) {
    const KeySlot key(c);
    const ValueSlot value(c);
    const MatrixSlot matrix(c);
    const GateSlot gate(c);
    mbarrier_wait(shared_address(&shared.key_full[key.stage]), key.parity);
    uint32_t s_operand[8][4];
    to_operand<Element>(s, s_operand);
    if constexpr (kFirst) decay_state(gate);
    pin(a);
    pin(o);
    wgmma_fence();
    multiply_by_tile<Element>(a, s_operand, shared_address(shared.k[key.stage]));
    wgmma_commit();
    multiply_by_tile<Element>(o, s_operand, shared_address(shared.q[key.stage]));
    wgmma_commit();

    if constexpr (!kFirst) decay_state(gate);

    // R = V - exp(b) K S.
    const GateVectors& gates = shared.gates[gate.stage];
    mbarrier_wait(shared_address(&shared.value_full[value.stage]), value.parity);
    const uint32_t v_tile = shared_address(shared.v[value.stage]) + half * kHalfTileBytes;
    wgmma_wait<1>();
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
    pin(o);
    pin(s_operand);
    uint32_t r_operand[4][4];
    to_operand<Element>(a, r_operand);

    // U = T R; meanwhile scale Q S.
    mbarrier_wait(shared_address(&shared.matrix_full[matrix.stage]), matrix.parity);
    const uint64_t t_tile = swizzled_tile(shared_address(shared.t[matrix.stage]));
    pin(a);
    wgmma_fence();
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      wgmma<Element, 64, Major::kOuter>(a, r_operand[j], advance(t_tile, j * 16 * 128), j > 0);
    }
    wgmma_commit();
    scale_columns(o, gates.from_start_scaled);
    wgmma_wait<0>();
    pin(a);
    pin(r_operand);
  }

  /// O += P U, then S' = exp(b_C) S + K^T (exp(b_C - b) U); O is written while S' is computed.
  __device__ __forceinline__ void complete(int c) {
    const KeySlot key(c);
    const MatrixSlot matrix(c);
    const GateSlot gate(c);
    uint32_t u_operand[4][4];
    uint32_t decayed_operand[4][4];  // exp(b_C - b) U
    to_operand<Element>(a, u_operand);
    const uint64_t p_tile = swizzled_tile(shared_address(shared.p[matrix.stage]));
    pin(o);
    wgmma_fence();
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      wgmma<Element, 64>(o, u_operand[j], advance(p_tile, j * 32), 1);
    }
    wgmma_commit();
    scale_columns(a, shared.gates[gate.stage].to_end);
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
    wgmma_wait<1>();
    pin(o);
    pin(u_operand);
    release(shared.matrix_empty[matrix.stage]);
    uint32_t packed[4][4];
    to_operand<Element>(o, packed);
    store_output(&p.o, p.o_view, work, packed,
                 shared_address(shared.o[c % kOutputStages]) + half * kHalfTileBytes, c, half, half,
                 thread);
    wgmma_wait<0>();
    pin(s);
    pin(decayed_operand);
    release(shared.key_empty[key.stage]);
  }

  __device__ __forceinline__ void run() {
    const int64_t head = int64_t{work.sequence} * p.HV + work.value_head;
    const StatePosition at(half, thread, p.state_v_first);
    if (p.initial_state != nullptr) {
      const float* state = p.initial_state + head * kStateSize;
      at.for_each([&](int i, int64_t offset) { s[i] = state[offset]; });
    } else {
#pragma unroll
      for (int i = 0; i < 64; ++i) s[i] = 0.0F;
    }
    if (work.chunks > 0) {
      float* segment_state = first_segment_state(p, work);
      const auto keep_state = [&](int c) {
        if (segment_state == nullptr || c % kSegmentChunks != 0) return;
        StatePosition(half, thread, false).for_each([&](int i, int64_t offset) {
          segment_state[offset] = s[i];
        });
        segment_state += p.HV * kStateSize;
      };
      // The second half of a chunk shares its iteration with the first half of the next, and no
      // product is in flight where the loop closes: the compiler waits for every product before a
      // use of S unless it sees S completed in the same iteration.
      keep_state(0);
      begin<true>(0);
      for (int c = 1; c < work.chunks; ++c) {
        complete(c - 1);
        keep_state(c);
        begin<false>(c);
      }
      complete(work.chunks - 1);
    }
    if (p.final_state != nullptr) {
      float* state = p.final_state + head * kStateSize;
      at.for_each([&](int i, int64_t offset) { state[offset] = s[i]; });
    }
    // The copy engine may still be reading this block's shared memory.
    if (thread == 0) tma_store_wait_read<0>();
  }

  /// Keeps the barriers going without the work, for a measurement of the matrix role alone.
  __device__ void run_idle() {
    for (int c = 0; c < work.chunks; ++c) {
      const MatrixSlot matrix(c);
      const ValueSlot value(c);
      mbarrier_wait(shared_address(&shared.value_full[value.stage]), value.parity);
      mbarrier_wait(shared_address(&shared.matrix_full[matrix.stage]), matrix.parity);
      release(shared.value_empty[ValueSlot(c).stage]);
      release(shared.key_empty[KeySlot(c).stage]);
      release(shared.gate_empty[GateSlot(c).stage]);
      release(shared.matrix_empty[matrix.stage]);
    }
  }

 private:
  /// S becomes exp(b_C) S.
  __device__ __forceinline__ void decay_state(const GateSlot& gate) {
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
