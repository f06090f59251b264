// Memory of large results: given back, kept and used again, and never too much of it.

#include <atomic>
#include <thread>
#include <vector>

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <gdn/ops/utils/result_memory.h>

namespace gdn {
namespace {

constexpr int64_t kMiB = int64_t{1} << 20;

at::Tensor bytes(int64_t mib, c10::Device device = c10::kCPU) {
  return empty_result({mib * kMiB}, at::TensorOptions(at::kByte).device(device));
}
size_t total() { return result_memory_use().used + result_memory_use().kept; }

TEST(ResultMemory, IsUsedAgain) {
  at::Tensor result = bytes(40);
  const void* const first = result.data_ptr();
  result = at::Tensor();
  EXPECT_GE(result_memory_use().kept, size_t{40} * kMiB);
  result = bytes(39);
  EXPECT_EQ(result.data_ptr(), first);
  EXPECT_NE(bytes(39).data_ptr(), first) << "in use";
}

TEST(ResultMemory, ALittleNeverHoldsALot) {
  bytes(50);
  const size_t used = result_memory_use().used;
  const at::Tensor result = bytes(20);
  EXPECT_LE(result_memory_use().used - used, size_t{25} * kMiB);
}

TEST(ResultMemory, IsNeverMoreThanWasUsedAtOnce) {
  { const at::Tensor a = bytes(60), b = bytes(60); }
  const size_t most = total();
  for (const int64_t mib : {30, 44, 70, 90, 110, 13}) {
    bytes(mib);
    EXPECT_LE(total(), most) << mib << " MiB";
  }
}

TEST(ResultMemory, SmallResultsAndOtherDevicesAreTorchs) {
  const ResultMemoryUse before = result_memory_use();
  const at::Tensor small = bytes(1), meta = bytes(64, c10::kMeta);
  EXPECT_EQ(result_memory_use().used, before.used);
  EXPECT_EQ(small.nbytes(), size_t{kMiB});
  EXPECT_TRUE(meta.is_meta());
}

TEST(ResultMemory, IsAnyTensors) {
  at::Tensor result = empty_result({3, 5, kMiB}, at::kFloat);
  EXPECT_EQ(result.sizes(), (std::vector<int64_t>{3, 5, kMiB}));
  EXPECT_EQ(result.scalar_type(), at::kFloat);
  EXPECT_TRUE(result.is_contiguous());
  result.fill_(2);
  result.resize_({32, kMiB});
  EXPECT_EQ(result.flatten()[15 * kMiB - 1].item<float>(), 2) << "kept by resize_";
  EXPECT_TRUE(at::equal(result.clone(), result));
}

TEST(ResultMemory, BelongsToOneTensorAtATime) {
  std::vector<std::thread> threads;
  std::atomic<int64_t> wrong = 0;
  for (int64_t id = 0; id < 4; ++id) {
    threads.emplace_back([id, &wrong] {
      for (int64_t round = 0; round < 50; ++round) {
        at::Tensor result = bytes(2 + (id + round) % 3);
        auto* const data = result.mutable_data_ptr<uint8_t>();
        const auto mark = static_cast<uint8_t>(id * 50 + round);
        for (int64_t i = 0; i < result.numel(); i += 4096) data[i] = mark;
        std::this_thread::yield();
        for (int64_t i = 0; i < result.numel(); i += 4096) wrong += data[i] != mark;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
}

}  // namespace
}  // namespace gdn
