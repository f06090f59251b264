// torch's thread pool for the kernels.
#pragma once

#include <atomic>

#include <ATen/Parallel.h>

#include <gdn/kernels/types.h>

namespace gdn {

/// kernels::ParallelFor on torch's threads (at::set_num_threads). Ranges are handed out one after
/// another to the thread that is free, since sequences differ in length.
inline void torch_parallel_for(int64_t count,
                               kernels::FunctionRef<void(int64_t begin, int64_t end)> body) {
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), count);
  if (threads <= 1 || at::in_parallel_region()) return kernels::serial_for(count, body);
  const int64_t grain = std::max<int64_t>(1, count / (threads * 8));
  std::atomic<int64_t> next = 0;
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t begin; (begin = next.fetch_add(grain)) < count;) {
      body(begin, std::min(begin + grain, count));
    }
  });
}

}  // namespace gdn
