// torch's thread pool for the kernels.
#pragma once

#include <ATen/Parallel.h>

#include <gdn/kernels/shares.h>

namespace gdn {

/// kernels::ParallelFor on torch's threads (at::set_num_threads).
inline void torch_parallel_for(int64_t count,
                               kernels::FunctionRef<void(int64_t begin, int64_t end)> body) {
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), count);
  if (threads <= 1 || at::in_parallel_region()) return kernels::serial_for(count, body);
  kernels::Shares shares(count, threads);
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) shares.work(thread, body);
  });
}

}  // namespace gdn
