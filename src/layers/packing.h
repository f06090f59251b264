// Padded batches as packed sequences, and back.
#pragma once

#include <cstdint>
#include <optional>
#include <string_view>

#include <ATen/core/Tensor.h>

namespace gdn {

/// `cu_seqlens` as contiguous int64 on the CPU. Rejects it (naming `op`) unless it is [N + 1] of
/// integers that rise from 0 to T, and B is 1.
at::Tensor checked_cu_seqlens(std::string_view op, const at::Tensor& cu_seqlens, int64_t B,
                              int64_t T);

/// Tokens of the longest sequence.
int64_t longest_sequence(const at::Tensor& cu_seqlens);

/// Where the tokens of a left-padded batch are.
struct Unpadding {
  int64_t B = 0, T = 0;
  at::Tensor indices;     ///< [tokens] int64 on the mask's device, into the B * T positions
  at::Tensor cu_seqlens;  ///< [B + 1] int64 on the CPU

  at::Tensor unpad(const at::Tensor& x) const;  ///< [B, T, ...] -> [1, tokens, ...]
  at::Tensor repad(const at::Tensor& x) const;  ///< [1, tokens, ...] -> [B, T, ...], 0 at padding
};

/// Nothing when the mask [B, T] has no padding. Rejects a mask that is not 0s and then 1s by row.
std::optional<Unpadding> find_padding(std::string_view op, const at::Tensor& attention_mask,
                                      int64_t B, int64_t T);

}  // namespace gdn
