// How a loop's iterations are handed to threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include <gdn/kernels/types.h>

namespace gdn::kernels {

/// Iterations [0, count) in one share a thread, the same from call to call: a state that a token
/// updates, or the rows that the next operator reads, stay in the cache of the core that has them.
/// A thread that is done helps the others, since sequences differ in length.
class Shares {
 public:
  Shares(int64_t count, int64_t threads)
      : grain_(std::max<int64_t>(1, count / (threads * 8))), shares_(static_cast<size_t>(threads)) {
    for (int64_t i = 0; i < threads; ++i) {
      shares_[static_cast<size_t>(i)].next = count * i / threads;
      shares_[static_cast<size_t>(i)].end = count * (i + 1) / threads;
    }
  }

  /// Thread `thread` of them: its own share, then what is left of the others'.
  void work(int64_t thread, FunctionRef<void(int64_t begin, int64_t end)> body) {
    for (size_t i = 0; i < shares_.size(); ++i) {
      Share& share = shares_[(static_cast<size_t>(thread) + i) % shares_.size()];
      for (int64_t begin; (begin = share.next.fetch_add(grain_)) < share.end;) {
        body(begin, std::min(begin + grain_, share.end));
      }
    }
  }

 private:
  struct alignas(64) Share {
    std::atomic<int64_t> next = 0;
    int64_t end = 0;
  };
  int64_t grain_;
  std::vector<Share> shares_;
};

}  // namespace gdn::kernels
