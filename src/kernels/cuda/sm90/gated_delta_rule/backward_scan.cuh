// The scan: from the last chunk to the first, dS of every chunk's end, and dV.
//
// dS^T, 64 of V's rows a warpgroup, stays in fp32 registers, as S^T does in the forward
// (state.cuh):
//   dU^T = exp(b_C - b) dS'^T K^T + dO^T P      dV^T = (beta dU)^T T
//   dS^T = exp(b_C) dS'^T + dO^T (scale exp(b) Q) - (exp(b) dV)^T K
// V's columns do not meet: with few sequences and heads each half gets a block of its own. The
// chain from dS' to dS is what such blocks wait for, so whatever does not depend on dS' is kept off
// it: two warps scale Q in place beforehand.
//
// Still fewer sequences and heads: a sequence is cut into spans. dS at a span's start is an affine
// function of dS at its end, R + M dS, R being the scan from dS = 0 and column v of M that from the
// v-th unit vector without dO. So a first pass finds every span's R and M at once, a short kernel
// composes them from the last span to the first, and a second pass scans the spans at once.
#pragma once

#include <gdn/kernels/cuda/sm90/gated_delta_rule/backward_replay.cuh>
#include <gdn/kernels/cuda/sm90/gated_delta_rule/backward_scan_loads.cuh>

namespace gdn::kernels::cuda::sm90 {

/// Where a scan's dS comes from and goes to, [K, V] or [V, K]; null is zero or the identity, and
/// nowhere.
struct ScanEnds {
  const float* from;
  float* to;
  bool from_v_first, to_v_first, from_identity;
};

/// One warpgroup's part: rows 64 half to 64 half + 63 of dS^T. `local` is half's place in the
/// block.
template <typename Element, int kHalves, Pass kPass>
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

  /// This warpgroup's half of dO^T as left operands.
  __device__ __forceinline__ void load_d_o(uint32_t (&d_o)[4][4], int stage) const {
    const uint32_t tile = shared_address(shared.d_o[stage]) + local * kHalfTileBytes;
#pragma unroll
    for (int block = 0; block < 4; ++block) {
      load_matrices_transposed(d_o[block], token_row(tile, block, warp, lane));
    }
  }

  /// Step i: from dS', the chunk's end, to beta dU in `a`; dS' decayed.
  template <bool kFirst>
  __device__ __forceinline__ void begin(int i) {
    const auto stage = slot(shared.full, i);
    const auto gate = slot(shared.gate_full, i);
    const GateVectors& gates = shared.gates[gate.stage];
    const uint64_t p_tile =
        swizzled_tile(shared_address(shared.matrices[stage.stage]) + kMatrixBytes);
    uint32_t s_operand[8][4];
    to_operand<Element>(s, s_operand);
    if constexpr (kPass == Pass::kGradients) store_state(s_operand, work.chunks - 1 - i);
    mbarrier_wait(shared_address(&shared.full[stage.stage]), stage.parity);
    uint32_t d_o[4][4];
    load_d_o(d_o, stage.stage);
    if constexpr (kFirst) decay_state(gate);
    pin(a);
    pin(o);
    wgmma_fence();
    multiply_by_tile<Element>(a, s_operand, shared_address(shared.k[stage.stage]));
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      wgmma<Element, 64, Major::kOuter>(o, d_o[j], advance(p_tile, j * 16 * 128), j > 0);
    }
    wgmma_commit();
    if constexpr (!kFirst) decay_state(gate);
    float2 written[8];
    float2 beta[8];
#pragma unroll
    for (int n = 0; n < kChunk / 8; ++n) {
      written[n] = *reinterpret_cast<const float2*>(&gates.written[8 * n + column]);
      beta[n] = *reinterpret_cast<const float2*>(&gates.beta[8 * n + column]);
    }
    wgmma_wait<0>();
    pin(a);
    pin(o);
    pin(s_operand);
    pin(d_o);
#pragma unroll
    for (int n = 0; n < kChunk / 8; ++n) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int e = 4 * n + 2 * r;
        a[e] = written[n].x * a[e] + beta[n].x * o[e];
        a[e + 1] = written[n].y * a[e + 1] + beta[n].y * o[e + 1];
      }
    }
  }

  /// From there to dS, the chunk's start; dV is written meanwhile.
  __device__ __forceinline__ void complete(int i) {
    const auto stage = slot(shared.full, i);
    const auto gate = slot(shared.gate_full, i);
    const GateVectors& gates = shared.gates[gate.stage];
    const uint64_t t_tile = swizzled_tile(shared_address(shared.matrices[stage.stage]));
    const uint64_t q_columns = swizzled_tile(shared_address(shared.q[stage.stage]), kHalfTileBytes);
    const uint64_t k_columns = swizzled_tile(shared_address(shared.k[stage.stage]), kHalfTileBytes);
    uint32_t d_u_operand[4][4];
    uint32_t d_o[4][4];
    to_operand<Element>(a, d_u_operand);
    pin(a);
    pin(s);
    wgmma_fence();
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      wgmma<Element, 64>(a, d_u_operand[j], advance(t_tile, j * 32), j > 0);
    }
    wgmma_commit();
    load_d_o(d_o, stage.stage);
    float2 decays[8];
#pragma unroll
    for (int n = 0; n < kChunk / 8; ++n) {
      decays[n] = *reinterpret_cast<const float2*>(&gates.from_start[8 * n + column]);
    }
    mbarrier_wait(shared_address(&shared.scaled[stage.stage]), stage.parity);
    wgmma_fence();
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      wgmma<Element, 128, Major::kOuter>(s, d_o[j], advance(q_columns, j * 16 * 128), 1);
    }
    wgmma_commit();
    wgmma_wait<1>();
    pin(a);
    pin(d_u_operand);
    uint32_t decayed_operand[4][4];  // -exp(b) dV
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        const float2 decay = decays[2 * j + m / 2];
        const int e = 8 * j + 2 * m;
        decayed_operand[j][m] = pack<Element>(-decay.x * a[e], -decay.y * a[e + 1]);
      }
    }
    wgmma_fence();
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      wgmma<Element, 128, Major::kOuter>(s, decayed_operand[j], advance(k_columns, j * 16 * 128),
                                         1);
    }
    wgmma_commit();
    release(shared.gate_empty[gate.stage]);
    if constexpr (kPass == Pass::kGradients) {
      uint32_t packed[4][4];
      to_operand<Element>(a, packed);
      // Two tiles in turn: before one is filled again, a meeting of the warpgroup has seen it read.
      store_output(&p.d_v, p.d_v_view, work, packed, shared_address(shared.d_v[i % 2][local]),
                   work.chunks - 1 - i, half, local, thread);
    }
    wgmma_wait<0>();
    pin(s);
    pin(d_o);
    pin(decayed_operand);
    release(shared.empty[stage.stage]);
  }

  __device__ __forceinline__ void run(const ScanEnds& ends) {
    if (ends.from != nullptr) {
      StatePosition(half, thread, ends.from_v_first).for_each([&](int i, int64_t offset) {
        s[i] = ends.from[offset];
      });
    } else {
      const StatePosition at(half, thread, false);
#pragma unroll
      for (int i = 0; i < 64; ++i) {
        const bool diagonal = at.v + 8 * (i / 2 % 2) == at.k + 8 * (i / 4) + i % 2;
        s[i] = ends.from_identity && diagonal ? 1.0F : 0.0F;
      }
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
      StatePosition(half, thread, ends.to_v_first).for_each([&](int i, int64_t offset) {
        ends.to[offset] = s[i];
      });
    }
    tma_store_wait_read<0>();
  }

 private:
  /// Stores of dS' are queued by another lane than that of dV's, which may still be reading: a lane
  /// waits for all that it has queued.
  static constexpr int kStateLane = 1;

  /// Each warp writes its 16 rows of dS', so none waits for another.
  __device__ __forceinline__ void store_state(const uint32_t (&operand)[8][4], int chunk) const {
    constexpr uint32_t kWarpBytes = 16 * 128;
    const uint32_t tile = shared_address(shared.d_s[local]);
    if (lane == kStateLane) tma_store_wait_read<0>();
    __syncwarp();
    stage_state(operand, tile, warp, lane);
    fence_async_proxy();
    __syncwarp();
    if (lane == kStateLane) {
      uint8_t* out = p.d_s + p.entry(first_chunk + chunk, work.value_head) * kStateBytes +
                     half * kStateHalfBytes;
      for (int k_half = 0; k_half < 2; ++k_half) {
        const uint32_t offset = k_half * kHalfTileBytes + warp * kWarpBytes;
        bulk_store(out + offset, tile + offset, kWarpBytes);
      }
      tma_store_commit();
    }
  }

  __device__ __forceinline__ void decay_state(const Slot<kGateStages>& gate) {
    mbarrier_wait(shared_address(&shared.gate_full[gate.stage]), gate.parity);
    const float decay = shared.gates[gate.stage].from_start[kChunk - 1];
#pragma unroll
    for (int i = 0; i < 64; ++i) s[i] *= decay;
  }
};

/// Blocks of a span in the first pass: R's two halves, then M's.
inline constexpr int kSpanBlocks = 4;

/// One block a sequence or span, value head and part of it: of V's halves, or of R and M.
template <typename Element, int kHalves, Pass kPass>
__global__ void __launch_bounds__(kScanThreads<kHalves>, 1)
    gated_delta_rule_scan_kernel(const __grid_constant__ BackwardArguments p) {
  extern __shared__ __align__(1024) uint8_t raw_shared[];
  auto& shared = *reinterpret_cast<ScanShared<kHalves>*>(raw_shared);
  constexpr int kParts = kPass == Pass::kSpans ? kSpanBlocks : 2 / kHalves;
  const int part = blockIdx.x % kParts;
  const int value_head = blockIdx.x / kParts % p.HV;
  const int index = blockIdx.x / kParts / p.HV;  // of the sequence or span
  const int lane = threadIdx.x % 32;
  const bool spans = p.span_tokens > 0;
  const Piece piece = spans ? find_piece(p, p.span_tokens, index, lane) : Piece{index, 0};
  if (piece.sequence == p.N) return;
  Work work(p, piece.sequence, value_head);
  if (absent(p, work)) return;
  const bool last = !spans || piece.index + 1 == piece_count(p, piece.sequence, p.span_tokens);
  const bool transition = kPass == Pass::kSpans && part >= 2;
  // The first span's start is left to the second pass; the last span starts from a known dS.
  if (kPass == Pass::kSpans && (piece.index == 0 || (transition && last))) return;

  int first_chunk = first_piece(p, kChunk, piece.sequence, lane);
  if (spans) {
    first_chunk += piece.index * (p.span_tokens / kChunk);
    work.narrow(int64_t{piece.index} * p.span_tokens, p.span_tokens);
  }
  const int64_t span = int64_t{index} * p.HV + value_head;
  const WindowEnds window = window_ends(p, work);
  ScanEnds ends = {nullptr, nullptr, false, false, transition};
  if (!last) {
    if (kPass == Pass::kGradients) ends.from = p.span_starts + (span + p.HV) * kStateSize;
  } else if (window.from != nullptr) {
    ends.from = window.from;
    ends.from_v_first = p.state_v_first;
  }
  if (kPass == Pass::kSpans) {
    ends.to = (transition ? p.span_transitions : p.span_starts) + span * kStateSize;
  } else if (piece.index == 0 && window.to != nullptr) {
    ends.to = window.to;
    ends.to_v_first = p.state_v_first;
  }

  if (threadIdx.x == 0) {
    init_barriers(shared.full, shared.empty, 1, 4 * kHalves);
    init_barriers(shared.gate_full, shared.gate_empty, 1, 4 * kHalves + 2);
    for (auto& barrier : shared.scaled) mbarrier_init(shared_address(&barrier), 2);
    mbarrier_init_fence();
    prefetch_tensor_map(&p.q);
    prefetch_tensor_map(&p.k);
    prefetch_tensor_map(&p.d_o);
    prefetch_tensor_map(&p.d_v);
  }
  if (transition) {
    auto* zeros = reinterpret_cast<uint4*>(shared.d_o);
    constexpr int kCount = sizeof(shared.d_o) / sizeof(uint4);
    for (int i = threadIdx.x; i < kCount; i += kScanThreads<kHalves>) zeros[i] = {0, 0, 0, 0};
    fence_async_proxy();
  }
  __syncthreads();
  const int warpgroup = __shfl_sync(0xffffffffU, threadIdx.x / 128, 0);
  const int thread = threadIdx.x % 128;
  const int first_half = kHalves == 2 ? 0 : part % 2;
  if (warpgroup == 0) {
    if constexpr (kHalves == 2) lower_registers<kScanLoadRegisters>();
    if (thread / 32 == 0) {
      load_scan_tiles(p, work, first_chunk, first_half, !transition, shared, thread);
    } else if (thread / 32 == 1) {
      load_scan_gates(p, work, shared, thread % 32);
    } else {
      scale_queries<Element>(work, shared, thread - 64);
    }
  } else {
    if constexpr (kHalves == 2) raise_registers<kScanStateRegisters>();
    const int local = warpgroup - 1;
    GradientScan<Element, kHalves, kPass>(p, work, first_chunk, shared, first_half + local, local,
                                          thread)
        .run(ends);
  }
}

}  // namespace gdn::kernels::cuda::sm90
