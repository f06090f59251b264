// The short convolution's tasks, taps and inputs as rows of D channels.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include <gdn/kernels/short_convolution.h>

namespace gdn::kernels::cpu {

/// Some consecutive tokens of sequence n; positions count from the sequence's first token.
struct TokenBlock {
  int64_t n, begin, end;
};

/// Blocks that cover all sequences in order, at least one (perhaps empty) of each.
inline std::vector<TokenBlock> token_blocks(const ShortConvolutionProblem& p,
                                            int64_t block_tokens) {
  std::vector<TokenBlock> blocks;
  for (int64_t n = 0; n < p.N; ++n) {
    const int64_t length = sequence_span(p, n).length;
    int64_t begin = 0;
    do {
      const int64_t end = std::min(begin + block_tokens, length);
      blocks.push_back({n, begin, end});
      begin = end;
    } while (begin < length);
  }
  return blocks;
}

struct Taps {
  int64_t W, D;
  std::vector<float> weight;  // [W, D]
  std::vector<float> bias;    // [D]; zeros when the problem has none
};

/// Where one block of the backward reads and writes gradients, all fp32.
struct ConvolutionGradients {
  const float* d_final;  // [W - 1, D] of the sequence, or null
  float* d_history;      // [W - 1, D] of the sequence, or null
  float* d_weight;       // [W + 1, D] sums; the last row is the bias's
  float* d_z;            // scratch: [tokens + W - 1, channels], rows d_z_stride apart
  int64_t d_z_stride;
};

inline int64_t element_size(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

/// The row of token t of sequence n in a [B, T, D] view.
template <typename Void>
auto* token_row(const ShortConvolutionProblem& p, const View3<Void>& view, int64_t n, int64_t t) {
  using Byte = std::conditional_t<std::is_const_v<Void>, const std::byte, std::byte>;
  const SequenceSpan span = sequence_span(p, n);
  const int64_t offset = span.b * view.stride_b + (span.first + t) * view.stride_t;
  return static_cast<Void*>(static_cast<Byte*>(view.data) + offset * element_size(p.dtype));
}

/// `to` [columns, rows] from `from` [rows, columns], elements of 2 or 4 bytes.
inline void transpose(const void* from, void* to, int64_t rows, int64_t columns, int64_t size) {
  const auto copy = [&]<typename Element>(const Element* source, Element* target) {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < columns; ++j) target[j * rows + i] = source[i * columns + j];
    }
  };
  if (size == 4) return copy(static_cast<const uint32_t*>(from), static_cast<uint32_t*>(to));
  copy(static_cast<const uint16_t*>(from), static_cast<uint16_t*>(to));
}

/// The inputs of every sequence as rows: the W - 1 before its first token come from the initial
/// state, which is copied, so that the final state may take its memory.
class InputRows {
 public:
  explicit InputRows(const ShortConvolutionProblem& p)
      : p_(p), size_(element_size(p.dtype)), state_bytes_((p.W - 1) * p.D * size_) {
    const int64_t states = p.initial_state == nullptr ? 1 : p.N;
    history_.resize(static_cast<size_t>(states * state_bytes_));  // zeros
    if (p.initial_state == nullptr) return;
    p.parallel_for(p.N, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        transpose(static_cast<const std::byte*>(p.initial_state) + n * state_bytes_,
                  history_.data() + n * state_bytes_, p.D, p.W - 1, size_);
      }
    });
  }

  /// The rows of tokens begin - W + 1 to end - 1 of sequence n.
  void fill(int64_t n, int64_t begin, int64_t end, const void** rows) const {
    for (int64_t t = begin - p_.W + 1; t < end; ++t) *rows++ = row(n, t);
  }

  /// The last W - 1 inputs of every sequence, as [N, D, W - 1].
  void store_final_states(void* final_state) const {
    p_.parallel_for(p_.N, [&](int64_t begin, int64_t end) {
      std::vector<std::byte> rows(static_cast<size_t>(state_bytes_));
      for (int64_t n = begin; n < end; ++n) {
        const int64_t first = sequence_span(p_, n).length - (p_.W - 1);
        for (int64_t i = 0; i < p_.W - 1; ++i) {
          std::copy_n(row(n, first + i), p_.D * size_, rows.data() + i * p_.D * size_);
        }
        transpose(rows.data(), static_cast<std::byte*>(final_state) + n * state_bytes_, p_.W - 1,
                  p_.D, size_);
      }
    });
  }

 private:
  /// Token t >= 1 - W of sequence n.
  const std::byte* row(int64_t n, int64_t t) const {
    if (t >= 0) return static_cast<const std::byte*>(token_row(p_, p_.x, n, t));
    const int64_t state = p_.initial_state == nullptr ? 0 : n;
    return history_.data() + state * state_bytes_ + (p_.W - 1 + t) * p_.D * size_;
  }

  const ShortConvolutionProblem& p_;
  int64_t size_;  // bytes of an element
  int64_t state_bytes_;
  std::vector<std::byte> history_;  // [N, W - 1, D]
};

}  // namespace gdn::kernels::cpu
