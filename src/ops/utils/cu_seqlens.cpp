#include <algorithm>
#include <sstream>
#include <string>

#include <ATen/ATen.h>

#include <gdn/ops/utils/check.h>
#include <gdn/ops/utils/cu_seqlens.h>

namespace gdn {

void check_cu_seqlens_shape(std::string_view op, const at::Tensor& cu_seqlens,
                            const c10::SymInt& B) {
  if (!cu_seqlens.defined() || cu_seqlens.dim() != 1 || cu_seqlens.sym_size(0) < 2 ||
      (cu_seqlens.scalar_type() != at::kInt && cu_seqlens.scalar_type() != at::kLong)) {
    reject(op, "cu_seqlens", "int32 or int64 of shape [N + 1] with N >= 1", describe(cu_seqlens));
  }
  if (B != 1) {
    std::ostringstream got;
    got << describe(cu_seqlens) << " with batch size " << B;
    reject(op, "cu_seqlens", "absent unless the batch size is 1", got.str());
  }
}

std::vector<int64_t> check_cu_seqlens(std::string_view op, const at::Tensor& cu_seqlens, int64_t B,
                                      int64_t T) {
  check_cu_seqlens_shape(op, cu_seqlens, B);
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
