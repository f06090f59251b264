#include <algorithm>
#include <cmath>
#include <numbers>

#include <gdn/training/schedule.h>

namespace gdn {

double learning_rate(const ScheduleOptions& options, int64_t step) {
  if (step < options.warmup) {
    return options.lr * static_cast<double>(step + 1) / static_cast<double>(options.warmup);
  }
  const int64_t first = std::max<int64_t>(options.warmup - 1, 0);  // the last step at the peak
  const int64_t length = std::max<int64_t>(options.steps - 1 - first, 1);
  const double done =
      std::min(1.0, static_cast<double>(step - first) / static_cast<double>(length));
  const double cosine = 0.5 * (1 + std::cos(std::numbers::pi * done));
  return options.lr * (options.min_lr_ratio + (1 - options.min_lr_ratio) * cosine);
}

}  // namespace gdn
