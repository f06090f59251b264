// The learning rate over a run: linear warm-up, then a cosine.
#pragma once

#include <cstdint>

namespace gdn {

struct ScheduleOptions {
  double lr = 1e-3;           ///< peak
  int64_t warmup = 0;         ///< steps
  int64_t steps = 0;          ///< of the whole run
  double min_lr_ratio = 0.1;  ///< last learning rate over the peak
};

/// Of step 0, 1, ..., steps - 1. The warm-up reaches the peak at step warmup - 1; the last step has
/// lr * min_lr_ratio.
double learning_rate(const ScheduleOptions& options, int64_t step);

}  // namespace gdn
