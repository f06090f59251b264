// What the kernels for wide heads (K to 256, any V) share; docs/hopper_wide.md derives them.
//
// A block has whole K, as four tiles of 64 of it, and one or two slices of 64 of V: their rows of
// S^T are all that it carries from chunk to chunk. What lies beyond the problem's K and V is zero.
// T and P come from a kernel of their own (wide_matrices.cuh), which fits beside no such state.
//
// What goes through scratch memory lies there as it does in shared memory, swizzled, so that plain
// bulk copies carry it. Its unit is the tile of 64 rows of 128 bytes, kHalfTileBytes = 8 KB.
#pragma once

#include <gdn/kernels/cuda/sm90/gated_delta_rule/backward.cuh>
#include <gdn/kernels/cuda/sm90/gated_delta_rule/pieces.cuh>

namespace gdn::kernels::cuda::sm90 {

inline constexpr int kWideKeys = 256;                                 // largest K
inline constexpr int kWideKeyTiles = kWideKeys / kHalf;               // of 64 of K
inline constexpr int kWideKeyBytes = kWideKeyTiles * kHalfTileBytes;  // K or Q of a chunk, 32 KB
inline constexpr int kSlice = kHalf;                                  // of V

// One chunk of one value head leaves in scratch memory:
inline constexpr int kWideMatricesBytes = 2 * kMatrixBytes;  // T^T (row j, columns i), P (row i)
// and for each slice of V:
inline constexpr int kWideWritesBytes = kHalfTileBytes;  // U^: 64 tokens x 64 of V
inline constexpr int kWideStateBytes = kWideKeyBytes;    // S^T, dS'^T: [4][64 of V][64 of K]

/// Arguments of every kernel for wide heads.
struct WideArguments : ProblemArguments {
  int slices;         // of V
  uint8_t* matrices;  // [chunks, HV][T^T, P]: kWideMatricesBytes each

  /// Entry of the arrays [chunks, HV]. Chunks are counted over all sequences: `chunk` is
  /// first_piece(p, kChunk, sequence, lane) and the chunk's number in its sequence.
  __device__ __forceinline__ int64_t entry(int64_t chunk, int value_head) const {
    return chunk * HV + value_head;
  }
  /// Entry of the arrays [chunks, HV, slices]. The last slice may have less than 64 of V; none
  /// beyond it has memory.
  __device__ __forceinline__ int64_t entry(int64_t chunk, int value_head, int slice) const {
    return entry(chunk, value_head) * slices + slice;
  }
  __device__ __forceinline__ uint8_t* matrices_of(int64_t chunk, int value_head) const {
    return matrices + entry(chunk, value_head) * kWideMatricesBytes;
  }
};

/// The replay's arguments: it fills `matrices` (T of Beta::kOfColumn), `s` and `u`.
struct WideReplayArguments : WideArguments {
  const float* segment_states;  // [segments, HV, K, V]
  uint8_t* s;                   // [chunks, HV, slices]: S^T at the chunk's start, kWideStateBytes
  uint8_t* u;                   // [chunks, HV, slices]: U^, kWideWritesBytes
};

inline int wide_slices(const GatedDeltaRuleProblem& p) {
  return static_cast<int>((p.V + kSlice - 1) / kSlice);
}

/// Number of entries [chunks, HV] of the arrays above, at most: 16 KB of T and P each in the
/// forward; in the backward besides U^, S and dS' of every slice, 72 KB.
inline int64_t wide_entries(const GatedDeltaRuleProblem& p) {
  return most_pieces(p, kChunk) * p.HV;
}

}  // namespace gdn::kernels::cuda::sm90
