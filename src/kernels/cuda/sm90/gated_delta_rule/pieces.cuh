// Sequences in pieces of equal numbers of tokens, of which the first may be longer, by `lead`
// tokens; a block finds its own, since lengths are known to the device alone.
#pragma once

#include <algorithm>

#include <gdn/kernels/cuda/sm90/gated_delta_rule/layout.cuh>
#include <gdn/kernels/gated_delta_rule.h>

namespace gdn::kernels::cuda::sm90 {

/// A piece (chunk, segment or span) of a sequence; sequence N is none.
struct Piece {
  int sequence, index;
};

/// At most so many pieces of `tokens` tokens have all sequences together, each at least `least`, in
/// a window of `window` tokens; their lengths are known to the device alone. A sequence may have a
/// piece more than fit, unless as much is taken off before.
template <typename Problem>
int64_t most_pieces(const Problem& p, int64_t tokens, int64_t least = 0,
                    int64_t window = kWholeSequence, int64_t lead = 0) {
  const int64_t each =
      std::max((std::min<int64_t>(p.T, window) - lead + tokens - 1) / tokens, least);
  if (p.cu_seqlens == nullptr) return p.N * each;
  return std::min(p.T / tokens + (lead < tokens ? p.N : 0), p.N * std::max<int64_t>(each, 1));
}

/// Pieces of `tokens` tokens that sequence n < N has in the window, at least `least`.
__device__ __forceinline__ int piece_count(const ProblemArguments& p, int n, int tokens,
                                           int least = 0, int64_t lead = 0) {
  return max(static_cast<int>((window_tokens(p, n) - lead + tokens - 1) / tokens), least);
}

/// As find_piece, by what the compiler does not know to be the same in every lane.
__device__ inline Piece search_piece(const ProblemArguments& p, int tokens, int index, int lane,
                                     int least, int64_t lead) {
  constexpr uint32_t kWarp = 0xffffffffU;
  if (p.cu_seqlens == nullptr) {
    const int each = piece_count(p, 0, tokens, least, lead);
    if (each == 0 || index >= each * p.N) return {p.N, 0};
    return {index / each, index % each};
  }
  int before = 0;
  for (int base = 0; base < p.N; base += 32) {
    const int count = base + lane < p.N ? piece_count(p, base + lane, tokens, least, lead) : 0;
    int sum = count;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int below = __shfl_up_sync(kWarp, sum, distance);
      if (lane >= distance) sum += below;
    }
    const uint32_t holders = __ballot_sync(kWarp, index < before + sum);
    if (holders != 0) {
      const int holder = __ffs(static_cast<int>(holders)) - 1;
      return {base + holder, index - before - __shfl_sync(kWarp, sum - count, holder)};
    }
    before += __shfl_sync(kWarp, sum, 31);
  }
  return {p.N, 0};
}

/// Piece `index` of all sequences together. Every lane of the warp calls it.
__device__ inline Piece find_piece(const ProblemArguments& p, int tokens, int index, int lane,
                                   int least = 0, int64_t lead = 0) {
  constexpr uint32_t kWarp = 0xffffffffU;
  const Piece piece = search_piece(p, tokens, index, lane, least, lead);
  // From lane 0: then loops over the piece's chunks count in uniform registers, and descriptors of
  // products are made there.
  return {__shfl_sync(kWarp, piece.sequence, 0), __shfl_sync(kWarp, piece.index, 0)};
}

/// Pieces of the sequences before `sequence`. Every lane of the warp calls it.
__device__ inline int first_piece(const ProblemArguments& p, int tokens, int sequence, int lane,
                                  int least = 0, int64_t lead = 0) {
  if (p.cu_seqlens == nullptr) return sequence * piece_count(p, 0, tokens, least, lead);
  int sum = 0;
  for (int n = lane; n < sequence; n += 32) sum += piece_count(p, n, tokens, least, lead);
  return __reduce_add_sync(0xffffffffU, sum);
}

/// Index of the first of a sequence's segment states. Every lane of the warp calls it.
__device__ inline int first_segment(const ProblemArguments& p, int sequence, int lane) {
  const auto count = [&](int n) {
    return static_cast<int>((sequence_tokens(p, n) + kSegmentTokens - 1) / kSegmentTokens);
  };
  if (p.cu_seqlens == nullptr) return sequence * count(0);
  int sum = 0;
  for (int n = lane; n < sequence; n += 32) sum += count(n);
  return __reduce_add_sync(0xffffffffU, sum);
}

}  // namespace gdn::kernels::cuda::sm90
