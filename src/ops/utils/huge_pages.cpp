#include <cstdint>
#include <utility>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <gdn/ops/utils/huge_pages.h>

namespace gdn {

at::Tensor on_huge_pages(at::Tensor fresh) {
#ifdef __linux__
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  if (fresh.is_cpu() && fresh.nbytes() >= kPage) {
    const auto address = reinterpret_cast<uintptr_t>(fresh.mutable_data_ptr());
    const uintptr_t begin = (address + kPage - 1) & ~(kPage - 1);
    const uintptr_t end = (address + fresh.nbytes()) & ~(kPage - 1);
    // An advice: where it is not taken, the pages stay small.
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  }
#endif
  return fresh;
}

}  // namespace gdn
