// Memory for large results on the CPU.
#pragma once

#include <ATen/core/Tensor.h>

namespace gdn {

/// `fresh`, which nothing has written to yet, on huge pages as far as Linux grants them: glibc maps
/// blocks of over 32 MB anew for every call, and then each 4 KB page costs a fault when it is first
/// written, which took a fifth of the gated delta rule's forward.
at::Tensor on_huge_pages(at::Tensor fresh);

}  // namespace gdn
