// How small_batch_linear() cuts a request: a pure function of it, for the kernel and for tests.
#pragma once

#include <cstdint>

#include <gdn/kernels/small_batch_linear.h>

namespace gdn::kernels::cuda {

inline constexpr int kLinearWarps = 8;    // of a block; they split D
inline constexpr int kLinearRows = 8;     // of the weight, a tile; and the most of x
inline constexpr int kLinearPiece = 8;    // elements that a lane fetches at once: 16 bytes
inline constexpr int kLinearStep = 32;    // elements of D that a warp takes at once: 4 lanes a row
inline constexpr int kLinearStage = 4;    // steps whose latencies overlap
inline constexpr int kLinearDepth = 3;    // stages in flight
inline constexpr int kLinearBlocks = 3;   // a multiprocessor
inline constexpr int kLinearMaxTaps = 4;  // of the convolution

struct SmallBatchLinearPlan {
  enum class Norm { none, rows, groups };
  Norm norm = Norm::none;
  int tiles = 0;   // of 8 weight rows
  int stages = 0;  // of a warp's slice of D
  int slice = 0;   // elements of D; past its end there are zeros
  int stride = 0;  // elements between rows of x in shared memory
  int64_t shared_bytes = 0;
};

SmallBatchLinearPlan plan_small_batch_linear(const SmallBatchLinear& p);

}  // namespace gdn::kernels::cuda
