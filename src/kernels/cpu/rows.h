// How the rows of a matrix are spread over threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include <gdn/kernels/types.h>

namespace gdn::kernels::cpu {

/// Elements that are worth a task of their own: some microseconds, as long as waking a thread
/// takes.
inline constexpr int64_t kTaskElements = 16384;

/// Calls body(begin, end) for ranges that cover the M rows of D elements.
template <typename Body>
void for_rows(ParallelFor parallel_for, int64_t M, int64_t D, const Body& body) {
  const int64_t rows = std::max<int64_t>(1, kTaskElements / std::max<int64_t>(1, D));
  parallel_for((M + rows - 1) / rows,
               [&](int64_t begin, int64_t end) { body(begin * rows, std::min(end * rows, M)); });
}

/// Sums over rows. Calls body(begin, end, partial) for ranges of rows, which adds to the `width`
/// partial sums of its range; writes their totals. The ranges depend on the sizes alone and are
/// added in order, so that the totals do not depend on the number of threads.
template <typename Body>
void sum_over_rows(ParallelFor parallel_for, int64_t M, int64_t D, int64_t width, float* total,
                   const Body& body) {
  constexpr int64_t kMaxRanges = 64;  // enough for many cores, few enough to add up at no cost
  const int64_t useful = (M * D + kTaskElements - 1) / kTaskElements;
  const int64_t ranges = std::clamp<int64_t>(useful, 1, std::clamp<int64_t>(M, 1, kMaxRanges));
  const int64_t rows = (M + ranges - 1) / ranges;
  std::vector<float> partials(static_cast<size_t>(ranges * width), 0.0F);
  parallel_for(ranges, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      body(std::min(i * rows, M), std::min((i + 1) * rows, M), partials.data() + i * width);
    }
  });
  std::fill_n(total, width, 0.0F);
  for (int64_t i = 0; i < ranges; ++i) {
    for (int64_t j = 0; j < width; ++j) total[j] += partials[i * width + j];
  }
}

}  // namespace gdn::kernels::cpu
