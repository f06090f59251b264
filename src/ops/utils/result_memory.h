// Memory for large results on the CPU.
#pragma once

#include <cstddef>

#include <ATen/core/Tensor.h>

namespace gdn {

/// Results from this size on have memory of their own.
inline constexpr size_t kLargeResult = size_t{2} << 20;

/// An uninitialised contiguous tensor, as at::empty makes it, for what an operator returns. On the
/// CPU a large one gets memory that an earlier result gave back, if there is some of that size: new
/// memory costs a page fault and zeros for each page, a fifth of the gated delta rule's forward.
/// What results give back is kept, but never so much that kept and used memory together exceed what
/// results have used at once. Any thread may call it.
at::Tensor empty_result(c10::SymIntArrayRef sizes, const at::TensorOptions& options);

/// Bytes of large results: in use, and given back and kept.
struct ResultMemoryUse {
  size_t used = 0;
  size_t kept = 0;
};
ResultMemoryUse result_memory_use();

}  // namespace gdn
