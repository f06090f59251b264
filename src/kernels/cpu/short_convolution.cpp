#include <algorithm>
#include <cstddef>
#include <type_traits>
#include <vector>

#include <gdn/kernels/cpu/element_type.h>
#include <gdn/kernels/cpu/short_convolution.h>
#include <gdn/kernels/cpu/short_convolution_rows.h>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "gdn/kernels/cpu/short_convolution.cpp"
#include <hwy/foreach_target.h>  // IWYU pragma: keep

#include <gdn/kernels/cpu/simd-inl.h>

HWY_BEFORE_NAMESPACE();
namespace gdn::kernels::cpu::HWY_NAMESPACE {

using F32 = hn::ScalableTag<float>;
inline constexpr int64_t kMaxLanes = hn::MaxLanes(F32());

/// Calls body(W) with the number of taps: for 4, which nearly every model has, a constant.
template <typename Body>
HWY_INLINE void with_taps(int64_t W, const Body& body) {
  if (W == 4) {
    body(std::integral_constant<int64_t, 4>());
  } else {
    body(W);
  }
}

/// Calls body(i, rest) for every vector of channels [first, last). `rest` channels are left, a
/// constant where they fill the vector, so that nothing asks.
template <typename Body>
HWY_INLINE void for_vectors(int64_t first, int64_t last, const Body& body) {
  constexpr auto kWhole = std::integral_constant<int64_t, kMaxLanes>();
  const auto lanes = static_cast<int64_t>(hn::Lanes(F32()));
  int64_t i = first;
  for (; i + lanes <= last; i += lanes) body(i, kWhole);
  if (i < last) body(i, last - i);
}

/// The sum before the activation, of the channels from i on. inputs: the W rows, oldest first.
template <typename T>
HWY_INLINE hn::Vec<F32> convolve(const Taps& taps, auto W, const void* const* inputs, int64_t i,
                                 auto rest) {
  const F32 d;
  auto z = LoadF32(d, taps.bias.data() + i, rest);
  for (int64_t w = 0; w < W; ++w) {
    const auto x = LoadF32(d, static_cast<const T*>(inputs[w]) + i, rest);
    z = hn::MulAdd(LoadF32(d, taps.weight.data() + w * taps.D + i, rest), x, z);
  }
  return z;
}

/// y of one block. inputs: the rows of tokens begin - W + 1 to end - 1.
template <typename T>
void convolve_tokens(const ShortConvolutionForward& p, const Taps& taps, auto W,
                     const void* const* inputs, const TokenBlock& block) {
  const F32 d;
  for (int64_t t = block.begin; t < block.end; ++t, ++inputs) {
    T* y = static_cast<T*>(token_row(p, p.y, block.n, t));
    for_vectors(0, p.D, [&](int64_t i, auto rest) HWY_ATTR {
      auto z = convolve<T>(taps, W, inputs, i, rest);
      if (p.silu) z = Silu(d, z);
      StoreF32(d, z, y + i, rest);
    });
  }
}

void convolve_block(const ShortConvolutionForward& p, const Taps& taps, const void* const* inputs,
                    const TokenBlock& block) {
  with_element_type(p.dtype, [&]<typename T>(T*) HWY_ATTR {
    with_taps(p.W, [&](auto W) HWY_ATTR { convolve_tokens<T>(p, taps, W, inputs, block); });
  });
}

/// d_z of the block and of the W - 1 tokens after it, which its last inputs reach, and the sums of
/// d_weight. The tokens of a vector of channels follow each other, so that its sums stay in
/// registers.
template <typename T>
void convolve_backward_outputs(const ShortConvolutionBackward& p, const Taps& taps, auto W,
                               const void* const* inputs, const TokenBlock& block, int64_t first,
                               int64_t last, const ConvolutionGradients& gradients) {
  const F32 d;
  const int64_t tokens = block.end - block.begin;
  const int64_t seen = std::min(tokens + W - 1, sequence_span(p, block.n).length - block.begin);
  for_vectors(first, last, [&](int64_t i, auto rest) HWY_ATTR {
    hn::Vec<F32> sum[kMaxTaps + 1];
    for (int64_t w = 0; w <= W; ++w) sum[w] = LoadF32(d, gradients.d_weight + w * p.D + i, rest);
    for (int64_t t = 0; t < tokens + W - 1; ++t) {
      auto e = hn::Zero(d);
      if (t < seen) {
        const T* d_y = static_cast<const T*>(token_row(p, p.d_y, block.n, block.begin + t));
        e = LoadF32(d, d_y + i, rest);
        if (p.silu) {
          const auto z = convolve<T>(taps, W, inputs + t, i, rest);
          e = hn::Mul(e, SiluGradient(d, z, Sigmoid(d, z)));
        }
      }
      StoreF32(d, e, gradients.d_z + t * gradients.d_z_stride + i - first, rest);
      if (t >= tokens) continue;
      for (int64_t w = 0; w < W; ++w) {
        const auto x = LoadF32(d, static_cast<const T*>(inputs[t + w]) + i, rest);
        sum[w] = hn::MulAdd(e, x, sum[w]);
      }
      sum[W] = hn::Add(e, sum[W]);
    }
    for (int64_t w = 0; w <= W; ++w) StoreF32(d, sum[w], gradients.d_weight + w * p.D + i, rest);
  });
}

/// d_x, and the gradients of the initial state, from d_z. Input e is token e - (W - 1); token t
/// takes inputs t to t + W - 1. The first W - 1 inputs are the initial state, the last W - 1 the
/// final state.
template <typename T>
void convolve_backward_inputs(const ShortConvolutionBackward& p, const Taps& taps, auto W,
                              const TokenBlock& block, int64_t first, int64_t last,
                              const ConvolutionGradients& gradients) {
  const F32 d;
  const int64_t length = sequence_span(p, block.n).length;
  const int64_t history = block.begin == 0 && gradients.d_history != nullptr ? 0 : W - 1;
  for (int64_t e = block.begin + history; e < block.end + W - 1; ++e) {
    const float* d_z = gradients.d_z + (e - block.begin) * gradients.d_z_stride;
    const auto of_channels = [&](int64_t i, auto rest, auto reached) HWY_ATTR {
      auto d_input = hn::Zero(d);
      if (gradients.d_final != nullptr && e >= length) {
        d_input = LoadF32(d, gradients.d_final + (e - length) * p.D + i, rest);
      }
      for (int64_t w = 0; w < reached; ++w) {
        const auto weight = LoadF32(d, taps.weight.data() + w * p.D + i, rest);
        const float* row = d_z - w * gradients.d_z_stride - first;
        d_input = hn::MulAdd(weight, LoadF32(d, row + i, rest), d_input);
      }
      if (e < W - 1) {
        StoreF32(d, d_input, gradients.d_history + e * p.D + i, rest);
      } else {
        T* d_x = static_cast<T*>(token_row(p, p.d_x, block.n, e - (W - 1)));
        StoreF32(d, d_input, d_x + i, rest);
      }
    };
    const int64_t tokens = e - block.begin + 1;  // of the block that the input reaches
    for_vectors(first, last, [&](int64_t i, auto rest) HWY_ATTR {
      if (tokens < W) return of_channels(i, rest, tokens);
      of_channels(i, rest, W);
    });
  }
}

/// Channels [first, last) of one block. inputs: the rows of tokens begin - W + 1 to end + W - 2, as
/// far as the sequence goes.
void convolve_backward_block(const ShortConvolutionBackward& p, const Taps& taps,
                             const void* const* inputs, const TokenBlock& block, int64_t first,
                             int64_t last, const ConvolutionGradients& gradients) {
  with_element_type(p.dtype, [&]<typename T>(T*) HWY_ATTR {
    with_taps(p.W, [&](auto W) HWY_ATTR {
      convolve_backward_outputs<T>(p, taps, W, inputs, block, first, last, gradients);
      convolve_backward_inputs<T>(p, taps, W, block, first, last, gradients);
    });
  });
}

/// n elements of dtype as fp32, and back.
void load_f32(const void* from, DType dtype, float* to, int64_t n) {
  with_element_type(dtype,
                    [&]<typename T>(T*) { ConvertElements(static_cast<const T*>(from), to, n); });
}
void store_f32(const float* from, DType dtype, void* to, int64_t n) {
  with_element_type(dtype, [&]<typename T>(T*) { ConvertElements(from, static_cast<T*>(to), n); });
}

}  // namespace gdn::kernels::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace gdn::kernels::cpu {
namespace {

HWY_EXPORT(convolve_block);
HWY_EXPORT(convolve_backward_block);
HWY_EXPORT(load_f32);
HWY_EXPORT(store_f32);

constexpr int64_t kForwardTokens = 64;
// The backward keeps its rows of d_z, weights and sums in the first-level cache: 32 tokens of 256
// channels are 32 KiB, of which one token's and its neighbours' rows are in use at a time.
constexpr int64_t kBackwardTokens = 32;
constexpr int64_t kBackwardChannels = 256;
constexpr int64_t kBackwardStride = kBackwardChannels + 16;  // an odd number of cache lines
// Partial sums of d_weight: enough for many cores, few enough to add up at no cost.
constexpr int64_t kMaxGroups = 32;

Taps load_taps(const ShortConvolutionProblem& p) {
  Taps taps = {p.W, p.D, std::vector<float>(p.W * p.D), std::vector<float>(p.D, 0.0F)};
  std::vector<float> weight(p.D * p.W);
  HWY_DYNAMIC_DISPATCH(load_f32)(p.weight, p.weight_dtype, weight.data(), p.D * p.W);
  transpose(weight.data(), taps.weight.data(), p.D, p.W, sizeof(float));
  if (p.bias != nullptr) {
    HWY_DYNAMIC_DISPATCH(load_f32)(p.bias, p.weight_dtype, taps.bias.data(), p.D);
  }
  return taps;
}

/// states [N, D, W - 1] as fp32 rows [N, W - 1, D].
std::vector<float> load_states(const ShortConvolutionProblem& p, const void* states) {
  const int64_t elements = (p.W - 1) * p.D;
  std::vector<float> rows(p.N * elements);
  p.parallel_for(p.N, [&](int64_t begin, int64_t end) {
    std::vector<float> state(elements);
    for (int64_t n = begin; n < end; ++n) {
      const auto* from =
          static_cast<const std::byte*>(states) + n * elements * element_size(p.dtype);
      HWY_DYNAMIC_DISPATCH(load_f32)(from, p.dtype, state.data(), elements);
      transpose(state.data(), rows.data() + n * elements, p.D, p.W - 1, sizeof(float));
    }
  });
  return rows;
}

/// The inverse of load_states.
void store_states(const ShortConvolutionProblem& p, const std::vector<float>& rows, void* states) {
  const int64_t elements = (p.W - 1) * p.D;
  p.parallel_for(p.N, [&](int64_t begin, int64_t end) {
    std::vector<float> state(elements);
    for (int64_t n = begin; n < end; ++n) {
      transpose(rows.data() + n * elements, state.data(), p.W - 1, p.D, sizeof(float));
      auto* to = static_cast<std::byte*>(states) + n * elements * element_size(p.dtype);
      HWY_DYNAMIC_DISPATCH(store_f32)(state.data(), p.dtype, to, elements);
    }
  });
}

}  // namespace

void short_convolution(const ShortConvolutionForward& p) {
  const Taps taps = load_taps(p);
  const InputRows rows(p);
  const std::vector<TokenBlock> blocks = token_blocks(p, kForwardTokens);
  p.parallel_for(static_cast<int64_t>(blocks.size()), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const void* inputs[kForwardTokens + kMaxTaps] = {};
      rows.fill(blocks[i].n, blocks[i].begin, blocks[i].end, inputs);
      HWY_DYNAMIC_DISPATCH(convolve_block)(p, taps, inputs, blocks[i]);
    }
  });
  if (p.final_state != nullptr) rows.store_final_states(p.final_state);
}

void short_convolution_backward(const ShortConvolutionBackward& p) {
  const Taps taps = load_taps(p);
  const InputRows rows(p);
  const int64_t state_elements = (p.W - 1) * p.D;
  std::vector<float> d_final, d_history;  // [N, W - 1, D]
  if (p.d_final_state != nullptr) d_final = load_states(p, p.d_final_state);
  if (p.d_initial_state != nullptr) d_history.resize(p.N * state_elements);

  const std::vector<TokenBlock> blocks = token_blocks(p, kBackwardTokens);
  const auto count = static_cast<int64_t>(blocks.size());
  const int64_t group_size = std::max<int64_t>(1, (count + kMaxGroups - 1) / kMaxGroups);
  const int64_t groups = (count + group_size - 1) / group_size;
  const int64_t chunks = (p.D + kBackwardChannels - 1) / kBackwardChannels;
  const int64_t sums = (p.W + 1) * p.D;  // d_weight [W, D], d_bias [D]
  std::vector<float> partials(groups * sums, 0.0F);
  p.parallel_for(groups * chunks, [&](int64_t begin, int64_t end) {
    std::vector<float> d_z((kBackwardTokens + p.W - 1) * kBackwardStride);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t group = task / chunks;
      const int64_t first = task % chunks * kBackwardChannels;
      const int64_t last = std::min(first + kBackwardChannels, p.D);
      for (int64_t i = group * group_size; i < std::min((group + 1) * group_size, count); ++i) {
        const int64_t n = blocks[i].n;
        const int64_t seen = std::min(blocks[i].end + p.W - 1, sequence_span(p, n).length);
        const void* inputs[kBackwardTokens + 2 * kMaxTaps] = {};
        rows.fill(n, blocks[i].begin, seen, inputs);
        const ConvolutionGradients gradients = {
            .d_final = d_final.empty() ? nullptr : d_final.data() + n * state_elements,
            .d_history = d_history.empty() ? nullptr : d_history.data() + n * state_elements,
            .d_weight = partials.data() + group * sums,
            .d_z = d_z.data(),
            .d_z_stride = kBackwardStride};
        HWY_DYNAMIC_DISPATCH(convolve_backward_block)
        (p, taps, inputs, blocks[i], first, last, gradients);
      }
    }
  });

  std::vector<float> total(sums, 0.0F);
  for (int64_t group = 0; group < groups; ++group) {
    for (int64_t i = 0; i < sums; ++i) total[i] += partials[group * sums + i];
  }
  if (p.d_weight != nullptr) transpose(total.data(), p.d_weight, p.W, p.D, sizeof(float));
  if (p.d_bias != nullptr) {
    std::copy_n(total.data() + p.W * p.D, p.D, static_cast<float*>(p.d_bias));
  }
  if (p.d_initial_state != nullptr) store_states(p, d_history, p.d_initial_state);
}

}  // namespace gdn::kernels::cpu
#endif  // HWY_ONCE
