// Padded batches as packed sequences, and back.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string_view>

#include <ATen/core/Tensor.h>

#include <gdn/layers/mixer_input.h>

namespace gdn {

/// check_cu_seqlens as a tensor: [N + 1] int64 on the CPU.
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

/// Computes [B, T, hidden_size] from hidden states of that shape and checked cu_seqlens, if packed.
using PackedMixer = std::function<at::Tensor(const at::Tensor& hidden_states,
                                             const std::optional<at::Tensor>& cu_seqlens)>;

/// Checks `input` and calls `mixer` on it, on padded batches in packed form.
at::Tensor mix_packed(std::string_view op, const MixerInput& input, int64_t hidden_size,
                      const PackedMixer& mixer);

}  // namespace gdn
