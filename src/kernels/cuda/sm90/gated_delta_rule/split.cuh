// The forward for few sequences and heads, as kernels of which each has blocks for all
// multiprocessors; docs/hopper.md derives them.
//
//   matrices  every chunk by itself: T and P, to scratch memory
//   spans     for every span of a sequence: S at its end from S = 0, and the transition of S
//   compose   S at the start of every span (compose.cuh)
//   outputs   every span from its S: O, final and segment states
//
// Outputs of spans may also be made by blocks of the one kernel's kind (forward.cuh), which make T
// and P themselves. Those of a sequence's first span, whose start is known, then belong to the
// first pass, and the span may be longer than the others; `matrices` makes T alone, of the spans in
// the middle, whose R and M are the rest of that pass.
//
// S at a span's end is an affine function of S at its start, R + M S: R is the scan from S = 0 and
// column j of M that from the j-th unit vector without V. Nothing is truncated. V's columns do not
// meet, so a block takes 64 or 128 of them. Without spans a sequence is one span, and the two
// kernels in the middle fall away.
#pragma once

#include <gdn/kernels/cuda/sm90/gated_delta_rule/forward.cuh>
#include <gdn/kernels/cuda/sm90/gated_delta_rule/pieces.cuh>

namespace gdn::kernels::cuda::sm90 {

inline constexpr int kChunkMatricesBytes = 2 * kMatrixBytes;  // T^T, P

struct SplitArguments : ForwardArguments {
  uint8_t* matrices;   // scratch: [chunks, HV], T^T and P as they lie in shared memory
  int matrix_tokens;   // of a block of the matrices' kernel
  int span_tokens;     // beyond every length: no spans
  int lead_tokens;     // by which a sequence's first span is longer than the others
  int v_rows;          // V in whole blocks
  float* span_states;  // scratch: [spans, HV, v_rows, 128]: R, then S at the end of every span
  float* transitions;  // scratch: [spans, HV, 128, 128]: M^T

  __device__ __forceinline__ uint8_t* chunk_matrices(int64_t chunk, int value_head) const {
    return matrices + (chunk * HV + value_head) * kChunkMatricesBytes;
  }
  /// First token of a sequence's span.
  __device__ __forceinline__ int64_t span_begin(int index) const {
    return index == 0 ? 0 : lead_tokens + int64_t{index} * span_tokens;
  }
  __device__ __forceinline__ int span_count(int sequence) const {
    return piece_count(*this, sequence, span_tokens, 1, lead_tokens);
  }
  /// Which of all spans is a sequence's first. Every lane of the warp calls it.
  __device__ __forceinline__ int first_span(int sequence, int lane) const {
    return first_piece(*this, span_tokens, sequence, lane, 1, lead_tokens);
  }
  /// Span `index` of all.
  __device__ __forceinline__ Piece find_span(int index, int lane) const {
    return find_piece(*this, span_tokens, index, lane, 1, lead_tokens);
  }
  /// Span `index` of all but the first ones of the sequences; but for the last ones too.
  __device__ __forceinline__ Piece find_later_span(int index, int lane) const {
    return after(find_piece(*this, span_tokens, index, lane, 0, later_lead()));
  }
  __device__ __forceinline__ Piece find_middle_span(int index, int lane) const {
    return after(find_piece(*this, span_tokens, index, lane, 0, later_lead() + span_tokens));
  }
  /// The state at the end of span `span` of all.
  __device__ __forceinline__ float* span_end(int64_t span, int value_head) const {
    return span_states + (span * HV + value_head) * v_rows * kHeadDim;
  }

 private:
  __device__ __forceinline__ int64_t later_lead() const {
    return int64_t{lead_tokens} + span_tokens;
  }
  static __device__ __forceinline__ Piece after(const Piece& piece) {
    return {piece.sequence, piece.index + 1};
  }
};

/// Two blocks of the matrices' kernel share a multiprocessor: while one waits, the other computes.
struct MatricesShared {
  alignas(1024) uint8_t k[2][kTileBytes];
  alignas(1024) uint8_t q[2][kTileBytes];
  alignas(1024) uint8_t matrices[1][kChunkMatricesBytes];
  __half a[2][kChunk * kHalfRow];
  alignas(16) float diagonal[4][16 * kDiagonalColumn];
  GateVectors gates[2];
  alignas(8) uint64_t key_full[2], key_empty[2];
  uint64_t matrix_full[1], matrix_empty[1];
  uint64_t gate_full[2], gate_empty[2];

  __device__ __forceinline__ uint32_t t_tile(int stage) const {
    return shared_address(matrices[stage]);
  }
  __device__ __forceinline__ uint32_t p_tile(int stage) const {
    return shared_address(matrices[stage]) + kMatrixBytes;
  }
};

inline constexpr int kMatricesThreads = 256;

/// Copies T^T, and P where wanted, of every chunk to scratch memory and hands the chunk's inputs
/// back; one lane.
__device__ inline void store_chunk_matrices(const SplitArguments& p, const Work& work,
                                            int64_t first_chunk, bool with_p,
                                            MatricesShared& shared) {
  for (int c = 0; c < work.chunks; ++c) {
    const auto matrix = slot(shared.matrix_full, c);
    mbarrier_wait(shared_address(&shared.matrix_full[matrix.stage]), matrix.parity);
    mbarrier_arrive(shared_address(&shared.key_empty[slot(shared.key_full, c).stage]));
    mbarrier_arrive(shared_address(&shared.gate_empty[slot(shared.gate_full, c).stage]));
    bulk_store(p.chunk_matrices(first_chunk + c, work.value_head), shared.t_tile(matrix.stage),
               with_p ? kChunkMatricesBytes : kMatrixBytes);
    tma_store_commit();
    tma_store_wait_read<0>();
    mbarrier_arrive(shared_address(&shared.matrix_empty[matrix.stage]));
  }
}

/// One block `matrix_tokens` tokens of a sequence and a value head; without P, of a span in the
/// middle.
template <typename Element, bool kWithP>
__global__ void __launch_bounds__(kMatricesThreads, 2)
    gated_delta_rule_matrices_kernel(const __grid_constant__ SplitArguments p) {
  extern __shared__ __align__(1024) uint8_t raw_shared[];
  auto& shared = *reinterpret_cast<MatricesShared*>(raw_shared);
  const int thread = threadIdx.x % 128;
  const int lane = thread % 32;
  let_next_kernel_start();
  const int index = blockIdx.x / p.HV;
  Piece piece;
  int64_t begin;
  int64_t tokens = p.matrix_tokens;
  if constexpr (kWithP) {
    piece = find_piece(p, p.matrix_tokens, index, lane);
    begin = piece.index * tokens;
  } else {
    const int parts = (p.span_tokens + p.matrix_tokens - 1) / p.matrix_tokens;
    piece = p.find_middle_span(index / parts, lane);
    const int64_t before = index % parts * tokens;
    begin = p.span_begin(piece.index) + before;
    tokens = min(tokens, p.span_tokens - before);
  }
  if (piece.sequence == p.N) return;
  if (threadIdx.x == 0) {
    init_barriers(shared.key_full, shared.key_empty, 1, 1);
    init_barriers(shared.matrix_full, shared.matrix_empty, 4, 1);
    init_barriers(shared.gate_full, shared.gate_empty, 1, 1);
    mbarrier_init_fence();
    prefetch_tensor_map(&p.q);
    prefetch_tensor_map(&p.k);
  }
  // The blocks of T^T and P on the empty side of the diagonal are never written again.
  auto* zeros = reinterpret_cast<uint4*>(shared.matrices);
  constexpr int kCount = sizeof(shared.matrices) / sizeof(uint4);
  for (int i = threadIdx.x; i < kCount; i += kMatricesThreads) zeros[i] = {0, 0, 0, 0};
  fence_async_proxy();
  __syncthreads();
  Work work(p, piece.sequence, blockIdx.x % p.HV);
  work.narrow(begin, tokens);
  const int warpgroup = __shfl_sync(0xffffffffU, threadIdx.x / 128, 0);
  if (warpgroup == 1) {
    run_chunk_matrices<Element, Beta::kOfRow, kWithP>(p, work, shared, thread);
  } else if (thread / 32 == 0) {
    for (int c = 0; c < work.chunks; ++c) load_keys(p, work, shared, c, kWithP, lane);
  } else if (thread / 32 == 1) {
    const int64_t first_chunk = first_piece(p, kChunk, piece.sequence, lane) + begin / kChunk;
    if (lane == 0) store_chunk_matrices(p, work, first_chunk, kWithP, shared);
  } else {
    load_gates<2>(p, work, shared, lane, thread / 32 - 2);
  }
}

/// kHalves halves of V, 64 columns each, in a block.
template <int kHalves>
struct SplitShared {
  static constexpr bool kLateOutput = true;  // see StateScan
  static constexpr int kStages = 3;
  alignas(1024) uint8_t k[kStages][kTileBytes];
  alignas(1024) uint8_t q[kStages][kTileBytes];
  alignas(1024) uint8_t matrices[kStages][kChunkMatricesBytes];
  alignas(1024) uint8_t v[kValueStages][kHalves * kHalfTileBytes];
  alignas(1024) uint8_t o[kOutputStages][kHalves * kHalfTileBytes];
  GateVectors gates[kGateStages];
  alignas(8) uint64_t key_full[kStages], key_empty[kStages];
  uint64_t value_full[kValueStages], value_empty[kValueStages];
  uint64_t matrix_full[kStages], matrix_empty[kStages];
  uint64_t gate_full[kGateStages], gate_empty[kGateStages];

  __device__ __forceinline__ uint32_t t_tile(int stage) const {
    return shared_address(matrices[stage]);
  }
  __device__ __forceinline__ uint32_t p_tile(int stage) const {
    return shared_address(matrices[stage]) + kMatrixBytes;
  }
};

inline constexpr int kSplitLoadRegisters = 40;
inline constexpr int kSplitStateRegisters = 232;

// With one half a thread may hold 255 from the start.
template <int kHalves>
constexpr int kSplitThreads = 128 * (1 + kHalves);

/// Brings T^T, and P where wanted, of every chunk; one lane, or one of each of kWarps warps.
template <int kWarps = 1, typename Shared>
__device__ void load_chunk_matrices(const SplitArguments& p, const Work& work, int64_t first_chunk,
                                    bool with_p, Shared& shared, int warp = 0) {
  const uint32_t bytes = (with_p ? kChunkMatricesBytes : kMatrixBytes) / kWarps;
  for (int c = 0; c < work.chunks; ++c) {
    const auto matrix = slot(shared.matrix_full, c);
    const uint32_t full = shared_address(&shared.matrix_full[matrix.stage]);
    mbarrier_wait(shared_address(&shared.matrix_empty[matrix.stage]), matrix.parity ^ 1);
    mbarrier_arrive_expect(full, bytes);
    bulk_load(shared.t_tile(matrix.stage) + warp * bytes,
              p.chunk_matrices(first_chunk + c, work.value_head) + warp * bytes, bytes, full);
  }
}

/// Narrows the work to a span of its sequence.
__device__ inline void narrow_to_span(const SplitArguments& p, Work& work, int index) {
  const int64_t begin = p.span_begin(index);
  work.narrow(begin, p.span_begin(index + 1) - begin);
}

template <typename Float = float>
__device__ inline StateView<Float> span_end_view(const SplitArguments& p, int index,
                                                 int value_head) {
  return {p.span_end(index, value_head), true, kHeadDim, p.v_rows};
}

/// Where the outputs' scan of a span, number `index` of all, begins and ends.
__device__ inline StateEnds output_ends(const SplitArguments& p, const Work& work,
                                        const Piece& piece, int index) {
  StateEnds ends = problem_ends(p, work);
  ends.first_chunk = static_cast<int>(p.span_begin(piece.index) / kChunk);
  if (piece.index > 0) {
    ends.from = span_end_view<const float>(p, index - 1, work.value_head);
  }
  if (piece.index + 1 < p.span_count(piece.sequence)) ends.to = {};
  return ends;
}

/// Those of the scan of its end from nothing, or of its transition.
__device__ inline StateEnds middle_ends(const SplitArguments& p, int value_head, int index,
                                        bool transition) {
  StateEnds ends;
  ends.from_identity = transition;
  if (transition) {
    const int64_t entry = int64_t{index} * p.HV + value_head;
    ends.to = {p.transitions + entry * kStateSize, true};
  } else {
    ends.to = span_end_view(p, index, value_head);
  }
  return ends;
}

/// Zeros instead of a V that is not loaded. The block's threads must meet before it is read.
template <typename Shared>
__device__ void clear_values(Shared& shared) {
  auto* zeros = reinterpret_cast<uint4*>(shared.v);
  constexpr int kCount = sizeof(shared.v) / sizeof(uint4);
  for (int i = threadIdx.x; i < kCount; i += blockDim.x) zeros[i] = {0, 0, 0, 0};
}

/// As run_roles, for the state at the end of a span: the matrix warps bring T.
template <typename Element>
__device__ __forceinline__ void run_end_roles(const SplitArguments& p, const Work& work,
                                              int64_t first_chunk, const StateEnds& ends,
                                              SharedMemory& shared, int first_half) {
  const int warpgroup = __shfl_sync(0xffffffffU, threadIdx.x / 128, 0);
  const int thread = threadIdx.x % 128;
  const int lane = thread % 32;
  if (warpgroup == 0) {
    lower_registers<kLoadRegisters>();
    if (thread / 32 == 0) {
      for (int c = 0; c < work.chunks; ++c) load_keys(p, work, shared, c, false, lane);
    } else if (thread / 32 == 1) {
      for (int c = 0; c < work.chunks; ++c) {
        load_values<2>(p, work, shared, c, !ends.from_identity, first_half, lane);
      }
    } else if (thread / 32 == 2) {
      load_gates(p, work, shared, lane);
    }
  } else if (warpgroup == 1) {
    lower_registers<kMatrixRegisters>();
    if (lane == 0) load_chunk_matrices<4>(p, work, first_chunk, false, shared, thread / 32);
  } else {
    raise_registers<kStateRegisters>();
    const int local = warpgroup - 2;
    StateScan<Element, SharedMemory, AnySizes, Scan::kEnd>(p, work, shared, first_half + local,
                                                           local, thread)
        .run(ends);
  }
}

/// The first pass where outputs are fused: one block a sequence, value head and 128 of V's columns
/// for the outputs of the first span, then one a span in the middle, value head and 128 columns of
/// R or of M.
template <typename Element, typename Needs>
__global__ void __launch_bounds__(kThreads, 1)
    gated_delta_rule_first_pass_kernel(const __grid_constant__ SplitArguments p) {
  extern __shared__ __align__(1024) uint8_t raw_shared[];
  auto& shared = *reinterpret_cast<SharedMemory*>(raw_shared);
  let_next_kernel_start();
  const int lane = threadIdx.x % 32;
  const int slices = (p.V + kHeadDim - 1) / kHeadDim;
  const int outputs = p.N * p.HV * slices;
  const int block = blockIdx.x;
  if (block < outputs) {
    initialise(shared, p);
    const Piece piece = {block / slices / p.HV, 0};
    Work work(p, piece.sequence, block / slices % p.HV);
    const int index = p.first_span(piece.sequence, lane);
    StateEnds ends = output_ends(p, work, piece, index);
    if (p.span_count(piece.sequence) > 1) ends.to = span_end_view(p, index, work.value_head);
    narrow_to_span(p, work, 0);
    run_roles<Element, Needs>(p, work, ends, shared, block % slices * 2);
  } else {
    const int parts = slices + 1;
    const int part = (block - outputs) % parts;
    const int value_head = (block - outputs) / parts % p.HV;
    const Piece piece = p.find_middle_span((block - outputs) / parts / p.HV, lane);
    if (piece.sequence == p.N) return;
    const bool transition = part == slices;
    if (transition) clear_values(shared);
    initialise(shared, p);
    Work work(p, piece.sequence, value_head);
    const int64_t first_chunk =
        first_piece(p, kChunk, piece.sequence, lane) + p.span_begin(piece.index) / kChunk;
    const StateEnds ends = middle_ends(
        p, value_head, p.first_span(piece.sequence, lane) + piece.index, transition);
    narrow_to_span(p, work, piece.index);
    wait_for_previous_kernel();
    run_end_roles<Element>(p, work, first_chunk, ends, shared, transition ? 0 : part * 2);
  }
  wait_for_previous_kernel();  // who waits for this kernel has waited for the one before
}

/// The outputs of the spans but the first ones by blocks that make T and P themselves: one block a
/// span, value head and 128 of V's columns.
template <typename Element, typename Needs>
__global__ void __launch_bounds__(kThreads, 1)
    gated_delta_rule_span_outputs_kernel(const __grid_constant__ SplitArguments p) {
  extern __shared__ __align__(1024) uint8_t raw_shared[];
  auto& shared = *reinterpret_cast<SharedMemory*>(raw_shared);
  let_next_kernel_start();
  initialise(shared, p);
  const int slices = (p.V + kHeadDim - 1) / kHeadDim;
  const int lane = threadIdx.x % 32;
  const int value_head = blockIdx.x / slices % p.HV;
  const Piece piece = p.find_later_span(blockIdx.x / slices / p.HV, lane);
  const int index = p.first_span(piece.sequence, lane) + piece.index;
  wait_for_previous_kernel();
  if (piece.sequence == p.N) return;
  Work work(p, piece.sequence, value_head);
  const StateEnds ends = output_ends(p, work, piece, index);
  narrow_to_span(p, work, piece.index);
  run_roles<Element, Needs>(p, work, ends, shared, blockIdx.x % slices * 2);
}

/// One block a span, value head and kHalves halves: of V; with Scan::kEnd first those of R's
/// columns, then of M's.
template <typename Element, int kHalves, typename Needs, Scan kScan>
__global__ void __launch_bounds__(kSplitThreads<kHalves>, 1)
    gated_delta_rule_split_kernel(const __grid_constant__ SplitArguments p) {
  extern __shared__ __align__(1024) uint8_t raw_shared[];
  auto& shared = *reinterpret_cast<SplitShared<kHalves>*>(raw_shared);
  constexpr bool kOutputs = kScan == Scan::kOutputs;
  const int value_parts = (p.V + kHalves * kHalf - 1) / (kHalves * kHalf);
  const int parts = value_parts + (kOutputs ? 0 : 2 / kHalves);
  const int part = blockIdx.x % parts;
  const int value_head = blockIdx.x / parts % p.HV;
  const int index = blockIdx.x / parts / p.HV;  // of the span
  const int thread = threadIdx.x % 128;
  const int lane = thread % 32;
  let_next_kernel_start();
  const Piece piece = p.find_span(index, lane);
  wait_for_previous_kernel();
  if (piece.sequence == p.N) return;
  const bool transition = part >= value_parts;
  const int first_half = (transition ? part - value_parts : part) * kHalves;
  // Nobody asks for the last span's end here; the first span's R starts from the known state.
  const bool last = piece.index + 1 == p.span_count(piece.sequence);
  if (!kOutputs && (last || (transition && piece.index == 0))) return;

  Work work(p, piece.sequence, value_head);
  StateEnds ends;
  if constexpr (kOutputs) {
    ends = output_ends(p, work, piece, index);
  } else {
    ends = middle_ends(p, value_head, index, transition);
    if (piece.index == 0) ends.from = problem_ends(p, work).from;
  }
  const int64_t first_chunk =
      first_piece(p, kChunk, piece.sequence, lane) + p.span_begin(piece.index) / kChunk;
  narrow_to_span(p, work, piece.index);

  if (threadIdx.x == 0) {
    init_barriers(shared.key_full, shared.key_empty, 1, 4 * kHalves);
    init_barriers(shared.value_full, shared.value_empty, 1, 4 * kHalves);
    init_barriers(shared.matrix_full, shared.matrix_empty, 1, 4 * kHalves);
    init_barriers(shared.gate_full, shared.gate_empty, 1, 4 * kHalves);
    mbarrier_init_fence();
    prefetch_tensor_map(&p.q);
    prefetch_tensor_map(&p.k);
    prefetch_tensor_map(&p.v);
    prefetch_tensor_map(&p.o);
  }
  if (transition) clear_values(shared);
  __syncthreads();
  const int warpgroup = __shfl_sync(0xffffffffU, threadIdx.x / 128, 0);
  if (warpgroup == 0) {
    if constexpr (kHalves == 2) lower_registers<kSplitLoadRegisters>();
    if (thread / 32 == 0) {
      for (int c = 0; c < work.chunks; ++c) load_keys(p, work, shared, c, kOutputs, lane);
    } else if (thread / 32 == 1) {
      for (int c = 0; c < work.chunks; ++c) {
        load_values<kHalves>(p, work, shared, c, !transition, first_half, lane);
      }
    } else if (thread / 32 == 2) {
      load_gates(p, work, shared, lane);
    } else if (lane == 0) {
      load_chunk_matrices(p, work, first_chunk, kOutputs, shared);
    }
  } else {
    if constexpr (kHalves == 2) raise_registers<kSplitStateRegisters>();
    const int local = warpgroup - 1;
    StateScan<Element, SplitShared<kHalves>, Needs, kScan>(p, work, shared, first_half + local,
                                                           local, thread)
        .run(ends);
  }
}

}  // namespace gdn::kernels::cuda::sm90
