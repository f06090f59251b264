#include <algorithm>
#include <string>

#include <ATen/ATen.h>

#include <gdn/ops/utils/check.h>
#include <gdn/ops/utils/cu_seqlens.h>

namespace gdn {

std::vector<int64_t> check_cu_seqlens(std::string_view op, const at::Tensor& cu_seqlens, int64_t B,
                                      int64_t T) {
  constexpr std::string_view kExpected = "int32 or int64 of shape [N + 1] with N >= 1";
  if (!cu_seqlens.defined() || cu_seqlens.dim() != 1 || cu_seqlens.numel() < 2 ||
      (cu_seqlens.scalar_type() != at::kInt && cu_seqlens.scalar_type() != at::kLong)) {
    reject(op, "cu_seqlens", kExpected, describe(cu_seqlens));
  }
  if (B != 1) {
    reject(op, "cu_seqlens", "absent unless the batch size is 1",
           describe(cu_seqlens) + " with batch size " + std::to_string(B));
  }
  const at::Tensor host = cu_seqlens.to(at::kCPU, at::kLong).contiguous();
  const int64_t* data = host.const_data_ptr<int64_t>();
  std::vector<int64_t> boundaries(data, data + host.numel());
  if (boundaries.front() != 0) {
    reject(op, "cu_seqlens[0]", "0", std::to_string(boundaries.front()));
  }
  if (boundaries.back() != T) {
    reject(op, "cu_seqlens[-1]", "the number of tokens " + std::to_string(T),
           std::to_string(boundaries.back()));
  }
  const auto drop = std::is_sorted_until(boundaries.begin(), boundaries.end());
  if (drop != boundaries.end()) {
    const auto n = drop - boundaries.begin();
    reject(op, "cu_seqlens", "non-decreasing",
           std::to_string(*(drop - 1)) + " then " + std::to_string(*drop) + " at position " +
               std::to_string(n));
  }
  return boundaries;
}

}  // namespace gdn
