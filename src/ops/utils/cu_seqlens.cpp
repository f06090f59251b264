#include <algorithm>
#include <optional>
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

namespace {

std::vector<int64_t> values_of(const at::Tensor& cu_seqlens) {
  const at::Tensor host = cu_seqlens.to(at::kCPU, at::kLong).contiguous();
  const int64_t* data = host.const_data_ptr<int64_t>();
  return {data, data + host.numel()};
}

/// The values of a tensor on a GPU. To read them waits for all work queued there, so those of the
/// last tensor asked for are kept: every layer of a model passes the same one.
std::vector<int64_t> values_from_device(const at::Tensor& cu_seqlens) {
  if (cu_seqlens.is_inference()) return values_of(cu_seqlens);  // counts no changes
  struct Last {
    c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl> tensor;
    int64_t version = 0;
    std::vector<int64_t> values;
  };
  static thread_local std::optional<Last> last;
  const auto current = cu_seqlens.getIntrusivePtr();
  if (!last || last->tensor.lock() != current || last->version != cu_seqlens._version()) {
    last = Last{c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>(current),
                cu_seqlens._version(), values_of(cu_seqlens)};
  }
  return last->values;
}

}  // namespace

std::vector<int64_t> check_cu_seqlens(std::string_view op, const at::Tensor& cu_seqlens, int64_t B,
                                      int64_t T) {
  check_cu_seqlens_shape(op, cu_seqlens, B);
  std::vector<int64_t> boundaries =
      cu_seqlens.is_cpu() ? values_of(cu_seqlens) : values_from_device(cu_seqlens);
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

SequenceBoundaries::SequenceBoundaries(std::string_view op, const at::Tensor& cu_seqlens, int64_t B,
                                       int64_t T, c10::Device device)
    : host(check_cu_seqlens(op, cu_seqlens, B, T)) {
  if (!device.is_cpu()) {
    copy = cu_seqlens.to(device, at::kLong, /*non_blocking=*/true).contiguous();
  }
}

int64_t SequenceBoundaries::longest() const {
  int64_t longest = 0;
  for (size_t n = 1; n < host.size(); ++n) longest = std::max(longest, host[n] - host[n - 1]);
  return longest;
}

const int64_t* SequenceBoundaries::data() const {
  return copy.defined() ? copy.const_data_ptr<int64_t>() : host.data();
}

}  // namespace gdn
