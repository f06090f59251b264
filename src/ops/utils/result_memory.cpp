#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <new>
#include <unordered_map>
#include <vector>

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>

#include <gdn/ops/utils/result_memory.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace gdn {
namespace {

/// Blocks start where a huge page does, and are a multiple of kGrain bytes long.
constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kGrain = size_t{64} << 10;

struct Block {
  void* data;
  size_t bytes;
};

void* new_block(size_t bytes) {
  void* data = nullptr;
  if (posix_memalign(&data, kHugePage, bytes) != 0) throw std::bad_alloc();
#ifdef __linux__
  // An advice: where it is not taken, the pages stay small.
  madvise(data, bytes, MADV_HUGEPAGE);
#endif
  return data;
}

class ResultMemory {
 public:
  void* take(size_t bytes) {
    bytes = (bytes + kGrain - 1) / kGrain * kGrain;
    const std::lock_guard lock(mutex_);
    Block block = take_kept(bytes);
    if (block.data == nullptr) {
      release_kept(bytes);
      block = {new_block(bytes), bytes};
    }
    sizes_[block.data] = block.bytes;
    use_.used += block.bytes;
    most_used_ = std::max(most_used_, use_.used);
    report(block.data, static_cast<int64_t>(block.bytes));
    return block.data;
  }

  void give_back(void* data) {
    const std::lock_guard lock(mutex_);
    const auto size = sizes_.find(data);
    use_.used -= size->second;
    use_.kept += size->second;
    kept_.push_back({data, size->second});
    report(data, -static_cast<int64_t>(size->second));
    sizes_.erase(size);
  }

  ResultMemoryUse use() {
    const std::lock_guard lock(mutex_);
    return use_;
  }

 private:
  /// Of the smallest kept blocks that hold `bytes`, and no more than a quarter more, the one that
  /// was given back last: it may still be in a cache. None: null.
  Block take_kept(size_t bytes) {
    auto best = kept_.end();
    for (auto block = kept_.begin(); block != kept_.end(); ++block) {
      const bool fits = block->bytes >= bytes && block->bytes <= bytes + bytes / 4;
      if (fits && (best == kept_.end() || block->bytes <= best->bytes)) best = block;
    }
    if (best == kept_.end()) return {nullptr, 0};
    const Block block = *best;
    kept_.erase(best);
    use_.kept -= block.bytes;
    return block;
  }

  /// Frees the blocks that were kept longest, until `bytes` more stay within what was used at once.
  void release_kept(size_t bytes) {
    const size_t limit = std::max(most_used_, use_.used + bytes);
    auto end = kept_.begin();
    while (use_.used + use_.kept + bytes > limit) {
      use_.kept -= end->bytes;
      std::free(end->data);
      ++end;
    }
    kept_.erase(kept_.begin(), end);
  }

  /// To torch's profiler.
  void report(void* data, int64_t bytes) const {
    if (!c10::memoryProfilingEnabled()) return;
    c10::reportMemoryUsageToProfiler(data, bytes, use_.used, use_.used + use_.kept, c10::kCPU);
  }

  std::mutex mutex_;
  std::vector<Block> kept_;                  // the one that was given back last at the end
  std::unordered_map<void*, size_t> sizes_;  // of blocks in use
  ResultMemoryUse use_;
  size_t most_used_ = 0;
};

/// Lives until the process ends: tensors may be freed after every destructor has run.
ResultMemory& memory() {
  static auto* const memory = new ResultMemory;
  return *memory;
}

class ResultAllocator : public c10::Allocator {
 public:
  at::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) return {nullptr, c10::kCPU};
    void* const data = memory().take(bytes);
    return {data, data, raw_deleter(), c10::kCPU};
  }
  at::DeleterFnPtr raw_deleter() const override {
    return [](void* data) {
      if (data != nullptr) memory().give_back(data);
    };
  }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
};

}  // namespace

at::Tensor empty_result(c10::SymIntArrayRef sizes, const at::TensorOptions& options) {
  if (options.device().is_cpu() && options.layout() == at::kStrided) {
    const auto known = c10::asIntArrayRefSlowOpt(sizes);
    if (known && c10::multiply_integers(*known) * options.dtype().itemsize() >= kLargeResult) {
      static auto* const allocator = new ResultAllocator;
      return at::detail::empty_generic(*known, allocator,
                                       c10::DispatchKeySet(c10::DispatchKey::CPU),
                                       c10::typeMetaToScalarType(options.dtype()), std::nullopt);
    }
  }
  return at::empty_symint(sizes, options);
}

ResultMemoryUse result_memory_use() { return memory().use(); }

}  // namespace gdn
