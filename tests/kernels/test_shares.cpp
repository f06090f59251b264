// How iterations are handed to threads.
#include <atomic>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

#include <gdn/kernels/shares.h>

namespace gdn::kernels::test {
namespace {

TEST(Shares, EveryIterationRunsOnce) {
  for (const int64_t threads : {1, 2, 3, 7}) {
    for (const int64_t count : {int64_t{7}, int64_t{8}, int64_t{100}, int64_t{1001}}) {
      std::vector<std::atomic<int>> runs(static_cast<size_t>(count));
      Shares shares(count, threads);
      const auto body = [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) ++runs[static_cast<size_t>(i)];
      };
      std::vector<std::thread> workers;
      for (int64_t i = 0; i < threads; ++i) workers.emplace_back([&, i] { shares.work(i, body); });
      for (std::thread& worker : workers) worker.join();
      for (const std::atomic<int>& n : runs) EXPECT_EQ(n, 1) << count << " by " << threads;
    }
  }
}

TEST(Shares, AThreadBeginsWithItsOwnAndHelpsTheOthers) {
  Shares shares(/*count=*/12, /*threads=*/3);
  std::vector<int64_t> order;
  shares.work(1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) order.push_back(i);
  });
  EXPECT_EQ(order, (std::vector<int64_t>{4, 5, 6, 7, 8, 9, 10, 11, 0, 1, 2, 3}));
}

}  // namespace
}  // namespace gdn::kernels::test
