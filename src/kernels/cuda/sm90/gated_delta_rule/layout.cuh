// The forward kernel's arguments, shared memory, barriers and roles; docs/hopper.md derives them.
#pragma once

#include <cstddef>

#include <gdn/kernels/cuda/sm90/wgmma.cuh>
#include <gdn/kernels/gated_delta_rule.h>

namespace gdn::kernels::cuda::sm90 {

inline constexpr int kChunk = 64;     // C
inline constexpr int kHeadDim = 128;  // K and V of the tiles; smaller ones are padded with zeros
inline constexpr int64_t kStateSize = kHeadDim * kHeadDim;
inline constexpr int kHalf = 64;  // elements of a swizzled 128-byte row
inline constexpr int kSegmentChunks = static_cast<int>(kSegmentTokens) / kChunk;

// Warpgroups by role, and what each thread of them may hold: 512 registers in all.
inline constexpr int kThreads = 512;
inline constexpr int kLoadRegisters = 24;
inline constexpr int kMatrixRegisters = 104;
inline constexpr int kStateRegisters = 192;

// Named barriers: one for the matrix warpgroup, one for each state warpgroup.
inline constexpr int kMatrixBarrier = 1;
inline constexpr int kStateBarrier = 2;

// Buffers of each kind.
inline constexpr int kKeyStages = 3;  // K and Q: the matrix role is a chunk or two ahead
inline constexpr int kValueStages = 2;
inline constexpr int kMatrixStages = 2;  // T and P
inline constexpr int kGateStages = 4;
inline constexpr int kOutputStages = 2;

inline constexpr int kHalfTileBytes = kChunk * kHalf * 2;  // 64 rows of 128 bytes
inline constexpr int kTileBytes = 2 * kHalfTileBytes;      // K, Q, V, O: [2, 64 tokens, 64]
inline constexpr int kMatrixBytes = kHalfTileBytes;        // T, P: 64 x 64
inline constexpr int kHalfRow = kChunk + 8;                // padded row of the fp16 copy of A
inline constexpr int kDiagonalColumn = 20;                 // padded column of a 16 x 16 block

/// What depends on the gates of one chunk, as vectors over its tokens. b is the running sum of g
/// in units of log 2; b_C its last element; b_J that of the last token of j's 16-token block.
struct GateVectors {
  float b[kChunk];
  float from_start[kChunk];         // exp2(b_i)
  float from_start_scaled[kChunk];  // scale * exp2(b_i)
  float to_end[kChunk];             // exp2(b_C - b_j)
  float to_block_end[kChunk];       // exp2(b_J - b_j)
  float beta[kChunk];
  float written[kChunk];  // exp2(b_C - b_j) beta_j
};

struct SharedMemory {
  static constexpr bool kLateOutput = false;  // see StateScan
  alignas(1024) uint8_t k[kKeyStages][kTileBytes];
  alignas(1024) uint8_t q[kKeyStages][kTileBytes];
  alignas(1024) uint8_t v[kValueStages][kTileBytes];
  alignas(1024) uint8_t o[kOutputStages][kTileBytes];
  alignas(1024) uint8_t t[kMatrixStages][kMatrixBytes];  // T^T: row j, columns i
  alignas(1024) uint8_t p[kMatrixStages][kMatrixBytes];  // P: row i, columns j
  __half a[2][kChunk * kHalfRow];  // -A below its diagonal 16-blocks; (I + A)^-1 in those
  alignas(16) float diagonal[4][16 * kDiagonalColumn];  // A's diagonal 16-blocks, column by column
  GateVectors gates[kGateStages];
  alignas(8) uint64_t key_full[kKeyStages], key_empty[kKeyStages];
  uint64_t value_full[kValueStages], value_empty[kValueStages];
  uint64_t matrix_full[kMatrixStages], matrix_empty[kMatrixStages];
  uint64_t gate_full[kGateStages], gate_empty[kGateStages];

  __device__ __forceinline__ uint32_t t_tile(int stage) const { return shared_address(t[stage]); }
  __device__ __forceinline__ uint32_t p_tile(int stage) const { return shared_address(p[stage]); }
};

/// Where chunk c lies in a ring of buffers, and the parity of its round.
template <int kStages>
struct Slot {
  int stage;
  uint32_t parity;
  __device__ __forceinline__ explicit Slot(uint32_t c)
      : stage(c % kStages), parity(c / kStages % 2) {}
};
/// The slot of chunk c in the ring with these barriers.
template <size_t kStages>
__device__ __forceinline__ Slot<static_cast<int>(kStages)> slot(const uint64_t (&)[kStages],
                                                                uint32_t c) {
  return Slot<static_cast<int>(kStages)>(c);
}

/// Tokens of a window that no sequence reaches beyond.
inline constexpr int64_t kWholeSequence = int64_t{1} << 62;

/// Kernel arguments of forward and backward; dimensions as in GatedDeltaRuleProblem.
struct ProblemArguments {
  CUtensorMap q, k;  // [B, T, H, K], boxes of 64 tokens x 64 elements
  CUtensorMap v;     // [B, T, HV, V], the same boxes
  ConstView4 q_view, k_view, v_view;
  const float* g;             // [B, T, HV]
  const float* beta;          // [B, T, HV]
  const int64_t* cu_seqlens;  // [N + 1] or null
  int64_t T;
  int N, H, HV, K, V;
  int all_heads;  // value heads of g, beta and the states, of which a launch serves HV
  // What a launch serves of every sequence: tokens window_begin to window_begin + window_tokens,
  // both multiples of kSegmentTokens.
  int64_t window_begin, window_tokens;
  float scale;
  bool state_v_first;
};

struct ForwardArguments : ProblemArguments {
  CUtensorMap o;  // [B, T, HV, V]
  MutableView4 o_view;
  const float* initial_state;  // [N, HV, K, V] or null
  float* final_state;          // [N, HV, K, V] or null
  float* segment_states;       // [segments, HV, K, V] or null
};

/// Tokens of a sequence.
__device__ __forceinline__ int64_t sequence_tokens(const ProblemArguments& p, int sequence) {
  return p.cu_seqlens != nullptr ? p.cu_seqlens[sequence + 1] - p.cu_seqlens[sequence] : p.T;
}

/// Those of them that are in the window.
__device__ __forceinline__ int64_t window_tokens(const ProblemArguments& p, int sequence) {
  return min(max(sequence_tokens(p, sequence) - p.window_begin, int64_t{0}), p.window_tokens);
}

/// The piece of work of one block: the window of a sequence, or a piece of it, and a value head.
struct Work {
  int sequence, value_head, key_head;
  int batch;
  int64_t begin, length;  // tokens within batch row `batch`
  int chunks;

  __device__ Work(const ProblemArguments& p, int sequence, int value_head)
      : sequence(sequence),
        value_head(value_head),
        key_head(value_head / (p.HV / p.H)),
        batch(p.cu_seqlens != nullptr ? 0 : sequence),
        begin((p.cu_seqlens != nullptr ? p.cu_seqlens[sequence] : 0) + p.window_begin),
        length(window_tokens(p, sequence)),
        chunks(chunk_count(length)) {}

  /// Keeps `tokens` tokens from token `first` on, fewer if the sequence ends before.
  __device__ void narrow(int64_t first, int64_t tokens) {
    begin += first;
    length = min(tokens, length - first);
    chunks = chunk_count(length);
  }

  /// Tokens of chunk c: 64, fewer in the last.
  __device__ int tokens(int c) const {
    return static_cast<int>(min(static_cast<int64_t>(kChunk), length - int64_t{c} * kChunk));
  }

 private:
  static __device__ int chunk_count(int64_t length) {
    return static_cast<int>((length + kChunk - 1) / kChunk);
  }
};

/// Initialises a ring's barriers with how many arrivals complete a phase of each.
template <size_t kStages>
__device__ __forceinline__ void init_barriers(uint64_t (&full)[kStages], uint64_t (&empty)[kStages],
                                              int full_arrivals, int empty_arrivals) {
  for (auto& barrier : full) mbarrier_init(shared_address(&barrier), full_arrivals);
  for (auto& barrier : empty) mbarrier_init(shared_address(&barrier), empty_arrivals);
}

/// Byte offset of 16-byte piece `piece` of row `row` in a tile of 128-byte rows, swizzled.
__device__ __forceinline__ uint32_t swizzled(int row, int piece) {
  return static_cast<uint32_t>(row * 128 + ((piece ^ (row & 7)) << 4));
}

/// Which roles do their work; the others only keep the barriers going. Benchmarks time the roles
/// alone; the operator uses kAll.
enum class Roles { kAll, kMatricesOnly, kStateOnly };

}  // namespace gdn::kernels::cuda::sm90
