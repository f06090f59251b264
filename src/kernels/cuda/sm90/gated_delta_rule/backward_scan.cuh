// The scan: from the last chunk to the first, dS of every chunk's end, and dV.
//
// dS^T, 64 of V's rows a warpgroup, stays in fp32 registers, as S^T does in the forward (state.cuh):
//   dU^T = exp(b_C - b) dS'^T K^T + dO^T P      dV^T = (beta dU)^T T
//   dS^T = exp(b_C) dS'^T + (scale exp(b) dO)^T Q - (exp(b) dV)^T K
// V's columns do not meet: with few sequences and heads each half gets a block of its own.
#pragma once

#include <gdn/kernels/cuda/sm90/gated_delta_rule/backward.cuh>
#include <gdn/kernels/cuda/sm90/gated_delta_rule/backward_replay.cuh>

namespace gdn::kernels::cuda::sm90 {

inline constexpr int kScanLoadRegisters = 40;
inline constexpr int kScanStateRegisters = 232;

// With one half a thread may hold 255 from the start.
template <int kHalves>
constexpr int kScanThreads = 128 * (1 + kHalves);

/// kHalves halves of V in a block.
template <int kHalves>
struct ScanShared {
  static constexpr int kStages = kHalves == 2 ? 2 : 3;
  alignas(1024) uint8_t k[kStages][kTileBytes];
  alignas(1024) uint8_t q[kStages][kTileBytes];
  alignas(1024) uint8_t d_o[kStages][kHalves * kHalfTileBytes];
  alignas(1024) uint8_t matrices[kStages][kMatricesBytes];
  alignas(1024) uint8_t d_s[kHalves][kStateHalfBytes];  // on their way out
  alignas(1024) uint8_t d_v[kHalves][kHalfTileBytes];
  GateVectors gates[kGateStages];
  alignas(8) uint64_t full[kStages], empty[kStages];
  uint64_t gate_full[kGateStages], gate_empty[kGateStages];
};

/// The work's chunks from the last to the first: step i is chunk chunks - 1 - i.
template <int kHalves>
__device__ void load_scan_tiles(const BackwardArguments& p, const Work& work, int64_t first_chunk,
                                int first_half, ScanShared<kHalves>& shared, int lane) {
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
        mbarrier_arrive_expect(full, 2 * kTileBytes + kHalves * kHalfTileBytes + kMatricesBytes);
        for (int half = 0; half < 2; ++half) {
          const uint32_t offset = half * kHalfTileBytes;
          tma_load(k + offset, &p.k, full, half * kHalf, work.key_head, token, work.batch);
          tma_load(q + offset, &p.q, full, half * kHalf, work.key_head, token, work.batch);
        }
        for (int half = 0; half < kHalves; ++half) {
          tma_load(d_o + half * kHalfTileBytes, &p.d_o, full, (first_half + half) * kHalf,
                   work.value_head, token, work.batch);
        }
      }
    } else {
      const int64_t token = int64_t{c} * kChunk;
      load_ragged_tile(k, element(p.k_view, work, work.key_head, token), p.k_view.stride_t, tokens,
                       lane);
      load_ragged_tile(q, element(p.q_view, work, work.key_head, token), p.q_view.stride_t, tokens,
                       lane);
      load_ragged_tile<kHalves>(
          d_o, element(p.d_o_view, work, work.value_head, token) + first_half * kHalf,
          p.d_o_view.stride_t, tokens, lane);
      fence_async_proxy();
      __syncwarp();
      if (lane == 0) mbarrier_arrive_expect(full, kMatricesBytes);
    }
    if (lane == 0) {
      bulk_load(shared_address(shared.matrices[stage.stage]),
                p.matrices + p.entry(first_chunk + c, work.value_head) * kMatricesBytes,
                kMatricesBytes, full);
    }
  }
}

template <int kHalves>
__device__ void load_scan_gates(const BackwardArguments& p, const Work& work,
                                ScanShared<kHalves>& shared, int lane) {
  GatePair next = fetch_gates(p, work, work.chunks - 1, lane);
  for (int i = 0; i < work.chunks; ++i) {
    const auto gate = slot(shared.gate_full, i);
    const GatePair gates = next;
    if (i + 1 < work.chunks) next = fetch_gates(p, work, work.chunks - 2 - i, lane);
    store_gates(gates, p.scale, shared.gates[gate.stage],
                shared_address(&shared.gate_empty[gate.stage]), gate.parity ^ 1, lane);
    if (lane == 0) mbarrier_arrive(shared_address(&shared.gate_full[gate.stage]));
  }
}

/// One warpgroup's part: rows 64 half to 64 half + 63 of dS^T. `local` is half's place in the block.
template <typename Element, int kHalves>
struct GradientScan {
  const BackwardArguments& p;
  const Work& work;
  int64_t first_chunk;
  ScanShared<kHalves>& shared;
  int half, local, thread, warp, lane, column;
  float s[64];  // dS^T
  float a[32];  // (K dS')^T, then dV^T
  float o[32];  // (P^T dO)^T

  __device__ __forceinline__ GradientScan(const BackwardArguments& p, const Work& work,
                                          int64_t first_chunk, ScanShared<kHalves>& shared,
                                          int half, int local, int thread)
      : p(p),
        work(work),
        first_chunk(first_chunk),
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

  /// From dS' to dV in `a`; dS' decayed, and what dO adds to it through Q.
  template <bool kFirst>
  __device__ __forceinline__ void begin(int i) {
    const auto stage = slot(shared.full, i);
    const auto gate = slot(shared.gate_full, i);
    mbarrier_wait(shared_address(&shared.gate_full[gate.stage]), gate.parity);
    mbarrier_wait(shared_address(&shared.full[stage.stage]), stage.parity);
    const GateVectors& gates = shared.gates[gate.stage];
    const uint64_t t_tile = swizzled_tile(shared_address(shared.matrices[stage.stage]));
    const uint64_t p_tile =
        swizzled_tile(shared_address(shared.matrices[stage.stage]) + kMatrixBytes);
    const uint64_t q_columns =
        swizzled_tile(shared_address(shared.q[stage.stage]), kHalfTileBytes);
    uint32_t s_operand[8][4];
    to_operand<Element>(s, s_operand);
    if constexpr (kFirst) decay_state(gates);
    pin(a);
    wgmma_fence();
    multiply_by_tile<Element>(a, s_operand, shared_address(shared.k[stage.stage]));
    wgmma_commit();

    const uint32_t d_o_tile = shared_address(shared.d_o[stage.stage]) + local * kHalfTileBytes;
    uint32_t d_o[4][4];
#pragma unroll
    for (int block = 0; block < 4; ++block) {
      load_matrices_transposed(d_o[block], token_row(d_o_tile, block, warp, lane));
    }
    pin(o);
    wgmma_fence();
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      wgmma<Element, 64, Major::kOuter>(o, d_o[j], advance(p_tile, j * 16 * 128), j > 0);
    }
    wgmma_commit();
    uint32_t scaled_d_o[4][4];  // scale exp(b) dO
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        const float2 factor = *reinterpret_cast<const float2*>(
            &gates.from_start_scaled[16 * j + 8 * (m / 2) + column]);
        const float2 x = unpack<Element>(d_o[j][m]);
        scaled_d_o[j][m] = pack<Element>(x.x * factor.x, x.y * factor.y);
      }
    }
    if constexpr (!kFirst) decay_state(gates);
    pin(s);
    wgmma_fence();
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      wgmma<Element, 128, Major::kOuter>(s, scaled_d_o[j], advance(q_columns, j * 16 * 128), 1);
    }
    wgmma_commit();
    stage_state(s_operand, shared_address(shared.d_s[local]), warp, lane);
    fence_async_proxy();
    state_sync_after_stores(local, thread);
    if (thread == 0) {
      bulk_store(p.d_s +
                     p.entry(first_chunk + work.chunks - 1 - i, work.value_head) * kStateBytes +
                     half * kStateHalfBytes,
                 shared_address(shared.d_s[local]), kStateHalfBytes);
      tma_store_commit();
    }
    wgmma_wait<1>();
    pin(a);
    pin(o);
    pin(s_operand);
    pin(d_o);
#pragma unroll
    for (int n = 0; n < kChunk / 8; ++n) {
      const float2 to_end = *reinterpret_cast<const float2*>(&gates.to_end[8 * n + column]);
      const float2 beta = *reinterpret_cast<const float2*>(&gates.beta[8 * n + column]);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int e = 4 * n + 2 * r;
        a[e] = beta.x * (to_end.x * a[e] + o[e]);
        a[e + 1] = beta.y * (to_end.y * a[e + 1] + o[e + 1]);
      }
    }
    uint32_t d_u_operand[4][4];
    to_operand<Element>(a, d_u_operand);
    pin(a);
    wgmma_fence();
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      wgmma<Element, 64>(a, d_u_operand[j], advance(t_tile, j * 32), j > 0);
    }
    wgmma_commit();
    wgmma_wait<0>();
    pin(s);
    pin(a);
    pin(scaled_d_o);
    pin(d_u_operand);
  }

  /// dS from what begin() left; dV is written meanwhile.
  __device__ __forceinline__ void complete(int i) {
    const auto stage = slot(shared.full, i);
    const auto gate = slot(shared.gate_full, i);
    const GateVectors& gates = shared.gates[gate.stage];
    uint32_t packed[4][4];
    uint32_t decayed_operand[4][4];  // -exp(b) dV
    to_operand<Element>(a, packed);
#pragma unroll
    for (int n = 0; n < kChunk / 8; ++n) {
      const float2 decay = *reinterpret_cast<const float2*>(&gates.from_start[8 * n + column]);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        a[4 * n + 2 * r] *= -decay.x;
        a[4 * n + 2 * r + 1] *= -decay.y;
      }
    }
    release(shared.gate_empty[gate.stage]);
    to_operand<Element>(a, decayed_operand);
    const uint64_t k_columns =
        swizzled_tile(shared_address(shared.k[stage.stage]), kHalfTileBytes);
    pin(s);
    wgmma_fence();
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      wgmma<Element, 128, Major::kOuter>(s, decayed_operand[j], advance(k_columns, j * 16 * 128),
                                         1);
    }
    wgmma_commit();
    store_output(&p.d_v, p.d_v_view, work, packed, shared_address(shared.d_v[local]),
                 work.chunks - 1 - i, half, local, thread);
    wgmma_wait<0>();
    pin(s);
    pin(decayed_operand);
    release(shared.empty[stage.stage]);
  }

  __device__ __forceinline__ void run() {
    const int64_t head = int64_t{work.sequence} * p.HV + work.value_head;
    const StatePosition at(half, thread, p.state_v_first);
    if (p.d_final_state != nullptr) {
      const float* state = p.d_final_state + head * kStateSize;
      at.for_each([&](int i, int64_t offset) { s[i] = state[offset]; });
    } else {
#pragma unroll
      for (int i = 0; i < 64; ++i) s[i] = 0.0F;
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
    if (p.d_initial_state != nullptr) {
      float* state = p.d_initial_state + head * kStateSize;
      at.for_each([&](int i, int64_t offset) { state[offset] = s[i]; });
    }
    if (thread == 0) tma_store_wait_read<0>();
  }

 private:
  __device__ __forceinline__ void decay_state(const GateVectors& gates) {
    const float decay = gates.from_start[kChunk - 1];
#pragma unroll
    for (int i = 0; i < 64; ++i) s[i] *= decay;
  }
};

template <typename Element, int kHalves>
__global__ void __launch_bounds__(kScanThreads<kHalves>, 1)
    gated_delta_rule_scan_kernel(const __grid_constant__ BackwardArguments p) {
  extern __shared__ __align__(1024) uint8_t raw_shared[];
  auto& shared = *reinterpret_cast<ScanShared<kHalves>*>(raw_shared);
  constexpr int kSplit = 2 / kHalves;  // blocks that share a head
  const int first_half = blockIdx.x % kSplit;
  const int sequence_head = blockIdx.x / kSplit;
  const Work work(p, sequence_head / p.HV, sequence_head % p.HV);
  const int first_chunk = first_piece(p, kChunk, work.sequence, threadIdx.x % 32);
  if (threadIdx.x == 0) {
    init_barriers(shared.full, shared.empty, 1, 4 * kHalves);
    init_barriers(shared.gate_full, shared.gate_empty, 1, 4 * kHalves);
    mbarrier_init_fence();
    prefetch_tensor_map(&p.q);
    prefetch_tensor_map(&p.k);
    prefetch_tensor_map(&p.d_o);
    prefetch_tensor_map(&p.d_v);
  }
  __syncthreads();
  const int warpgroup = __shfl_sync(0xffffffffU, threadIdx.x / 128, 0);
  const int thread = threadIdx.x % 128;
  if (warpgroup == 0) {
    if constexpr (kHalves == 2) lower_registers<kScanLoadRegisters>();
    if (thread / 32 == 0) {
      load_scan_tiles(p, work, first_chunk, first_half, shared, thread);
    } else if (thread / 32 == 1) {
      load_scan_gates(p, work, shared, thread % 32);
    }
  } else {
    if constexpr (kHalves == 2) raise_registers<kScanStateRegisters>();
    const int local = warpgroup - 1;
    GradientScan<Element, kHalves>(p, work, first_chunk, shared, first_half + local, local, thread)
        .run();
  }
}

}  // namespace gdn::kernels::cuda::sm90
