// How work is cut so that few heads keep many cores busy: slices of V's columns, and phases.
#pragma once

#include <algorithm>
#include <cstdint>

namespace gdn::kernels::cpu {

/// Columns [first, first + count) of V.
struct Columns {
  int64_t first, count;
};

/// Columns of U and S do not depend on each other, so a slice computes what the whole would, bit
/// for bit, but makes the scores and the gates' tiles again and multiplies narrower tiles: three
/// tenths of the time, measured at K = V = 128. Of 1 to V / 32 slices the number that ends soonest
/// when `threads` threads share `tasks` tasks of as many slices, if that saves a tenth.
inline int64_t column_slices(int64_t tasks, int64_t V, int64_t threads) {
  constexpr int64_t kNarrowest = 32;
  constexpr double kRepeated = 0.3, kWorthwhile = 0.9;
  const auto time = [&](int64_t slices) {
    const int64_t rounds = (tasks * slices + threads - 1) / threads;
    return static_cast<double>(rounds) *
           (kRepeated + (1.0 - kRepeated) / static_cast<double>(slices));
  };
  int64_t best = 1;
  double least = kWorthwhile * time(1);
  for (int64_t slices = 2; slices <= V / kNarrowest; ++slices) {
    if (time(slices) >= least) continue;
    best = slices;
    least = time(slices);
  }
  return best;
}

/// Slices begin at multiples of so many columns, as the kernels' tiles need.
inline constexpr int64_t kSliceAlign = 16;

/// Slice `index` of `slices`.
inline Columns column_slice(int64_t V, int64_t slices, int64_t index) {
  const int64_t blocks = (V + kSliceAlign - 1) / kSliceAlign;
  const int64_t begin = blocks * index / slices * kSliceAlign;
  const int64_t end = std::min(V, blocks * (index + 1) / slices * kSliceAlign);
  return {begin, end - begin};
}

/// Whether the backward goes through a segment in phases, where `tasks` are all that it has
/// otherwise. In phases the tiles of a segment leave the L2 cache and sequences come one after the
/// other, so it takes half of the threads idle to gain.
inline bool in_phases(int64_t tasks, int64_t threads) { return 2 * tasks <= threads; }

}  // namespace gdn::kernels::cpu
