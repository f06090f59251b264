// Boundaries of packed sequences.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include <ATen/core/Tensor.h>

namespace gdn {

/// Throws c10::ValueError unless cu_seqlens is int32 or int64 [N + 1] and B is 1. Reads no values,
/// and sizes may be symbolic.
void check_cu_seqlens_shape(std::string_view op, const at::Tensor& cu_seqlens,
                            const c10::SymInt& B);

/// cu_seqlens [N + 1] (int32 or int64) as int64 in host memory: sequence n of the only batch row
/// holds the tokens cu_seqlens[n] to cu_seqlens[n + 1], possibly none. Throws c10::ValueError
/// unless B is 1 and the boundaries start at 0, never decrease and end at T.
std::vector<int64_t> check_cu_seqlens(std::string_view op, const at::Tensor& cu_seqlens, int64_t B,
                                      int64_t T);

/// Checked boundaries in host memory and where the kernels of a device read them.
struct SequenceBoundaries {
  std::vector<int64_t> host;
  at::Tensor copy;  // on a device that is not the CPU

  SequenceBoundaries(std::string_view op, const at::Tensor& cu_seqlens, int64_t B, int64_t T,
                     c10::Device device);
  int64_t sequences() const { return static_cast<int64_t>(host.size()) - 1; }
  int64_t longest() const;
  const int64_t* data() const;
};

}  // namespace gdn
