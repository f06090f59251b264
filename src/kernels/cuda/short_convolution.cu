// The short convolution: a thread owns a few channels and walks over a block of tokens with the
// last inputs in registers, from sequence to sequence where they are packed.
//
// Kernels are compiled for 4 and 8 taps; fewer are the last ones, behind taps that are missing.
#include <gdn/kernels/cuda/column_sums.cuh>
#include <gdn/kernels/cuda/short_convolution.h>

namespace gdn::kernels::cuda {
namespace {

constexpr int kBlock = 128;
constexpr int64_t kForwardTokens = 32;    // of a thread
constexpr int64_t kBackwardTokens = 128;  // more: the W - 1 behind them are computed twice
constexpr int kMaxChannels = 4;           // of a thread

/// The sequence that a token belongs to: index, first token, the one after the last, batch row.
struct Sequence {
  int64_t n, begin, end, b;
};

/// The sequence of token t of batch row b; t < T.
__device__ Sequence sequence_of(const ShortConvolutionProblem& p, int64_t b, int64_t t) {
  if (p.cu_seqlens == nullptr) return {b, 0, p.T, b};
  int64_t low = 0, high = p.N - 1;  // the last n with cu_seqlens[n] <= t: none empty lies there
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (p.cu_seqlens[middle] <= t) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return {low, p.cu_seqlens[low], p.cu_seqlens[low + 1], 0};
}

__device__ Sequence sequence_at(const ShortConvolutionProblem& p, int64_t n) {
  if (p.cu_seqlens == nullptr) return {n, 0, p.T, n};
  return {n, p.cu_seqlens[n], p.cu_seqlens[n + 1], 0};
}

template <typename T, int kTaps, int kChannels>
struct Channels {
  const ShortConvolutionProblem& p;
  int64_t d;    // the first channel
  int missing;  // of the kTaps
  float weight[kTaps][kChannels];
  float bias[kChannels];
  float x[kTaps][kChannels];  // the inputs at tokens t - kTaps + 1 to t

  __device__ Channels(const ShortConvolutionProblem& p, int64_t d)
      : p(p), d(d), missing(kTaps - static_cast<int>(p.W)) {
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
#pragma unroll
      for (int w = 0; w < kTaps; ++w) {
        float value[1] = {0.0F};
        if (w >= missing) {
          load_parameter<T>(p.weight, p.weight_dtype, (d + c) * p.W + w - missing, value);
        }
        weight[w][c] = value[0];
      }
      float value[1] = {0.0F};
      if (p.bias != nullptr) load_parameter<T>(p.bias, p.weight_dtype, d + c, value);
      bias[c] = value[0];
    }
  }

  /// The inputs at token t; those before the sequence come from its initial state.
  __device__ void input(const Sequence& s, int64_t t, float (&values)[kChannels]) const {
    if (t >= s.begin) {
      load<kChannels>(static_cast<const T*>(p.x.data) + s.b * p.x.stride_b + t * p.x.stride_t + d,
                      values);
      return;
    }
    const int64_t i = t - s.begin + p.W - 1;  // in the state
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      values[c] = p.initial_state == nullptr || i < 0
                      ? 0.0F
                      : to_float(static_cast<const T*>(
                            p.initial_state)[(s.n * p.D + d + c) * (p.W - 1) + i]);
    }
  }

  /// Fills x for a next token t.
  __device__ void start(const Sequence& s, int64_t t) {
#pragma unroll
    for (int w = 1; w < kTaps; ++w) input(s, t - kTaps + w, x[w]);
  }

  /// Moves on to token t.
  __device__ void advance(const Sequence& s, int64_t t) {
#pragma unroll
    for (int w = 0; w + 1 < kTaps; ++w) {
#pragma unroll
      for (int c = 0; c < kChannels; ++c) x[w][c] = x[w + 1][c];
    }
    input(s, t, x[kTaps - 1]);
  }

  /// The sum before the activation.
  __device__ float sum(int c) const {
    float z = bias[c];
#pragma unroll
    for (int w = 0; w < kTaps; ++w) {
      if (w >= missing) z = fmaf(weight[w][c], x[w][c], z);  // else x may be NaN
    }
    return z;
  }

  /// The last W - 1 inputs as the final state of sequence n. Every thread that reads this part of
  /// the initial state is this one.
  __device__ void store_final(int64_t n, void* final_state) const {
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
#pragma unroll
      for (int w = 1; w < kTaps; ++w) {
        if (w <= missing) continue;
        static_cast<T*>(final_state)[(n * p.D + d + c) * (p.W - 1) + w - 1 - missing] =
            from_float<T>(x[w][c]);
      }
    }
  }
};

/// Grid: channels, then blocks of tokens, then batch rows.
template <typename T, int kTaps, int kChannels>
__global__ void __launch_bounds__(kBlock) convolution_kernel(ShortConvolutionForward p) {
  const int64_t d = (int64_t{blockIdx.x} * kBlock + threadIdx.x) * kChannels;
  if (d >= p.D) return;
  const int64_t begin = blockIdx.y * kForwardTokens;
  const int64_t end = min(p.T, begin + kForwardTokens);
  Channels<T, kTaps, kChannels> channels(p, d);
  for (int64_t b = blockIdx.z; b < p.B; b += gridDim.z) {
    Sequence s = sequence_of(p, b, begin);
    channels.start(s, begin);
    for (int64_t t = begin; t < end; ++t) {
      if (t == s.end) {
        s = sequence_of(p, b, t);
        channels.start(s, t);
      }
      channels.advance(s, t);
      float y[kChannels];
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        const float z = channels.sum(c);
        y[c] = p.silu ? silu(z) : z;
      }
      store<kChannels>(static_cast<T*>(p.y.data) + b * p.y.stride_b + t * p.y.stride_t + d, y);
    }
    if (p.final_state != nullptr) channels.store_final(s.n, p.final_state);
  }
}

/// Grid: channels, then sequences.
template <typename T, int kTaps, int kChannels>
__global__ void __launch_bounds__(kBlock) final_state_kernel(ShortConvolutionForward p) {
  const int64_t d = (int64_t{blockIdx.x} * kBlock + threadIdx.x) * kChannels;
  if (d >= p.D) return;
  Channels<T, kTaps, kChannels> channels(p, d);
  for (int64_t n = blockIdx.y; n < p.N; n += gridDim.y) {
    const Sequence s = sequence_at(p, n);
    channels.start(s, s.end);
    channels.store_final(n, p.final_state);
  }
}

/// d_z at token t of s, whose inputs `channels` holds.
template <typename T, int kTaps, int kChannels>
__device__ void sum_gradient(const ShortConvolutionBackward& p, const Sequence& s, int64_t t,
                             const Channels<T, kTaps, kChannels>& channels,
                             float (&d_z)[kChannels]) {
  load<kChannels>(
      static_cast<const T*>(p.d_y.data) + s.b * p.d_y.stride_b + t * p.d_y.stride_t + channels.d,
      d_z);
  if (!p.silu) return;
#pragma unroll
  for (int c = 0; c < kChannels; ++c) d_z[c] *= silu_gradient(channels.sum(c));
}

/// The last gradients of sums: of tokens t - kTaps + 1 to t.
template <int kTaps, int kChannels>
struct GradientWindow {
  float d_z[kTaps][kChannels];

  __device__ void push(const float (&next)[kChannels]) {
#pragma unroll
    for (int w = 0; w < kTaps; ++w) {
#pragma unroll
      for (int c = 0; c < kChannels; ++c) d_z[w][c] = w + 1 < kTaps ? d_z[w + 1][c] : next[c];
    }
  }
  __device__ void clear() {
#pragma unroll
    for (int w = 0; w < kTaps; ++w) {
#pragma unroll
      for (int c = 0; c < kChannels; ++c) d_z[w][c] = 0.0F;
    }
  }
};

/// Grid: channels, then blocks of tokens, then batch rows. A block goes on for kTaps - 1 tokens
/// behind its own, within the last one's sequence. parts [B, token blocks, D, W + 1]: the sums of
/// d_weight and d_bias over the block's own tokens.
template <typename T, int kTaps, int kChannels>
__global__ void __launch_bounds__(kBlock)
    convolution_backward_kernel(ShortConvolutionBackward p, float* parts) {
  const int64_t d = (int64_t{blockIdx.x} * kBlock + threadIdx.x) * kChannels;
  if (d >= p.D) return;
  const int64_t begin = blockIdx.y * kBackwardTokens;
  const int64_t end = min(p.T, begin + kBackwardTokens);
  Channels<T, kTaps, kChannels> channels(p, d);
  const int missing = channels.missing;
  for (int64_t b = blockIdx.z; b < p.B; b += gridDim.z) {
    Sequence s = sequence_of(p, b, begin);
    channels.start(s, begin);
    GradientWindow<kTaps, kChannels> window;
    window.clear();
    float d_weight[kTaps][kChannels] = {}, d_bias[kChannels] = {};
    // Writes d_x at token t - kTaps + 1, once the window has reached token t.
    const auto write = [&](int64_t t) {
      const int64_t at = t - kTaps + 1;
      if (at < begin || at < s.begin || at >= end) return;
      const int64_t i = at - (s.end - (p.W - 1));  // in the final state
      float d_x[kChannels];
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        d_x[c] = 0.0F;
#pragma unroll
        for (int w = 0; w < kTaps; ++w) {
          if (w < missing) continue;  // d_z may be NaN
          d_x[c] = fmaf(channels.weight[w][c], window.d_z[kTaps - 1 - w][c], d_x[c]);
        }
        if (i >= 0 && p.d_final_state != nullptr) {
          d_x[c] +=
              to_float(static_cast<const T*>(p.d_final_state)[(s.n * p.D + d + c) * (p.W - 1) + i]);
        }
      }
      store<kChannels>(static_cast<T*>(p.d_x.data) + b * p.d_x.stride_b + at * p.d_x.stride_t + d,
                       d_x);
    };
    for (int64_t t = begin; t < min(s.end, end + kTaps - 1); ++t) {
      channels.advance(s, t);
      float d_z[kChannels];
      sum_gradient(p, s, t, channels, d_z);
      if (t < end) {
#pragma unroll
        for (int c = 0; c < kChannels; ++c) {
#pragma unroll
          for (int w = 0; w < kTaps; ++w) {
            d_weight[w][c] = fmaf(channels.x[w][c], d_z[c], d_weight[w][c]);
          }
          d_bias[c] += d_z[c];
        }
      }
      window.push(d_z);
      write(t);
      if (t + 1 < s.end) continue;
      // Behind the sequence's last token there are no sums; then the next sequence begins.
      const float zeros[kChannels] = {};
      for (int i = 1; i < kTaps; ++i) {
        window.push(zeros);
        write(t + i);
      }
      if (t + 1 >= end) break;
      s = sequence_of(p, b, t + 1);
      channels.start(s, t + 1);
      window.clear();
    }
    float* part = parts + ((b * gridDim.y + blockIdx.y) * p.D + d) * (p.W + 1);
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
#pragma unroll
      for (int w = 0; w < kTaps; ++w) {
        if (w >= missing) part[c * (p.W + 1) + w - missing] = d_weight[w][c];
      }
      part[c * (p.W + 1) + p.W] = d_bias[c];
    }
  }
}

/// Grid: channels, then sequences. What reaches the initial state: the first sums, and the final
/// state where the sequence is shorter than it.
template <typename T, int kTaps, int kChannels>
__global__ void __launch_bounds__(kBlock) initial_gradient_kernel(ShortConvolutionBackward p) {
  const int64_t d = (int64_t{blockIdx.x} * kBlock + threadIdx.x) * kChannels;
  if (d >= p.D) return;
  Channels<T, kTaps, kChannels> channels(p, d);
  for (int64_t n = blockIdx.y; n < p.N; n += gridDim.y) {
    const Sequence s = sequence_at(p, n);
    const int64_t length = s.end - s.begin;
    channels.start(s, s.begin);
    float d_z[kTaps - 1][kChannels];
#pragma unroll
    for (int t = 0; t < kTaps - 1; ++t) {
      if (t < length) {
        channels.advance(s, s.begin + t);
        sum_gradient(p, s, s.begin + t, channels, d_z[t]);
      } else {
#pragma unroll
        for (int c = 0; c < kChannels; ++c) d_z[t][c] = 0.0F;
      }
    }
    // Token a - kTaps + 1 before the start meets the sum of token t with weight a - t.
#pragma unroll
    for (int a = 0; a < kTaps - 1; ++a) {
      const int64_t i = a - channels.missing;  // in the state
      if (i < 0) continue;
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        float sum = 0.0F;
#pragma unroll
        for (int t = 0; t <= a; ++t) {
          if (a - t < channels.missing) continue;
          sum = fmaf(channels.weight[a - t][c], d_z[t][c], sum);
        }
        const int64_t row = (n * p.D + d + c) * (p.W - 1);
        if (p.d_final_state != nullptr && i >= length) {
          sum += to_float(static_cast<const T*>(p.d_final_state)[row + i - length]);
        }
        static_cast<T*>(p.d_initial_state)[row + i] = from_float<T>(sum);
      }
    }
  }
}

/// d_weight [D, W] and d_bias [D] from sums [D, W + 1].
__global__ void split_sums_kernel(ShortConvolutionBackward p, const float* sums) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= p.D * (p.W + 1)) return;
  const int64_t d = i / (p.W + 1), w = i % (p.W + 1);
  if (w == p.W) {
    if (p.d_bias != nullptr) static_cast<float*>(p.d_bias)[d] = sums[i];
  } else if (p.d_weight != nullptr) {
    static_cast<float*>(p.d_weight)[d * p.W + w] = sums[i];
  }
}

/// Calls body with the element type, taps and channels as constants, and the blocks of channels.
template <typename Body, typename... Views>
void with_shape(const ShortConvolutionProblem& p, const Body& body, const Views&... views) {
  if (p.W < kMinTaps || p.W > kMaxTaps) {
    throw std::invalid_argument("short_convolution: W must be 2 to 8, got " + std::to_string(p.W));
  }
  with_element_type(p.dtype, [&]<typename T>(T*) {
    const auto with_channels = [&]<int kChannels>() {
      const auto blocks = static_cast<unsigned>(divide_up(p.D, kBlock * kChannels));
      if (p.W <= 4) {
        body.template operator()<T, 4, kChannels>(blocks);
      } else {
        body.template operator()<T, 8, kChannels>(blocks);
      }
    };
    constexpr int64_t kBytes = sizeof(T) * kMaxChannels;
    const bool aligned = ((rows_aligned<T>(views.data, views.stride_t, kBytes) &&
                           rows_aligned<T>(views.data, views.stride_b, kBytes)) &&
                          ...);
    if (p.D % kMaxChannels == 0 && aligned) {
      with_channels.template operator()<kMaxChannels>();
    } else {
      with_channels.template operator()<1>();
    }
  });
}

/// Grid sizes beyond the first are limited; kernels loop over what is more, except token blocks.
unsigned grid_size(int64_t count) {
  return static_cast<unsigned>(std::clamp<int64_t>(count, 1, 65535));
}

unsigned token_blocks(const ShortConvolutionProblem& p, int64_t tokens) {
  const int64_t blocks = divide_up(p.T, tokens);
  if (blocks > 65535) {
    throw std::invalid_argument("short_convolution: T must be at most " +
                                std::to_string(65535 * tokens) + ", got " + std::to_string(p.T));
  }
  return static_cast<unsigned>(blocks);
}

}  // namespace

void short_convolution(const ShortConvolutionForward& problem, Stream stream) {
  ShortConvolutionForward p = problem;
  if (p.D == 0 || p.N == 0) return;
  // A thread that sees a whole sequence can write its final state, even over the initial one.
  const bool whole_sequences = p.cu_seqlens == nullptr && p.T > 0 && p.T <= kForwardTokens;
  if (!whole_sequences) p.final_state = nullptr;
  if (p.B > 0 && p.T > 0) {
    const auto launch = [&]<typename T, int kTaps, int kChannels>(unsigned blocks) {
      const dim3 grid(blocks, token_blocks(p, kForwardTokens), grid_size(p.B));
      convolution_kernel<T, kTaps, kChannels><<<grid, kBlock, 0, stream>>>(p);
    };
    with_shape(p, launch, p.x, p.y);
    check_launch("short_convolution");
  }
  if (whole_sequences || problem.final_state == nullptr) return;
  const auto launch = [&]<typename T, int kTaps, int kChannels>(unsigned blocks) {
    final_state_kernel<T, kTaps, kChannels>
        <<<dim3(blocks, grid_size(p.N)), kBlock, 0, stream>>>(problem);
  };
  with_shape(p, launch, p.x);
  check_launch("short_convolution, final state");
}

int64_t short_convolution_backward_scratch(const ShortConvolutionBackward& p) {
  const int64_t parts = p.B * divide_up(p.T, kBackwardTokens);
  return scratch_floats(parts * p.D * (p.W + 1)) + scratch_floats(p.D * (p.W + 1));
}

void short_convolution_backward(const ShortConvolutionBackward& p, void* scratch, Stream stream) {
  if (p.D == 0) return;
  const int64_t count = p.B * divide_up(p.T, kBackwardTokens);
  const int64_t columns = p.D * (p.W + 1);
  auto* parts = static_cast<float*>(scratch);
  float* sums = parts + scratch_floats(count * columns) / 4;
  if (count > 0) {
    const auto launch = [&]<typename T, int kTaps, int kChannels>(unsigned blocks) {
      const dim3 grid(blocks, token_blocks(p, kBackwardTokens), grid_size(p.B));
      convolution_backward_kernel<T, kTaps, kChannels><<<grid, kBlock, 0, stream>>>(p, parts);
    };
    with_shape(p, launch, p.x, p.d_y, p.d_x);
    check_launch("short_convolution_backward");
  }
  if (p.d_weight != nullptr || p.d_bias != nullptr) {
    add_parts(parts, count, columns, sums, stream);
    split_sums_kernel<<<static_cast<unsigned>(divide_up(columns, kBlock)), kBlock, 0, stream>>>(
        p, sums);
    check_launch("short_convolution_backward, weight");
  }
  if (p.d_initial_state == nullptr || p.N == 0) return;
  const auto launch = [&]<typename T, int kTaps, int kChannels>(unsigned blocks) {
    initial_gradient_kernel<T, kTaps, kChannels>
        <<<dim3(blocks, grid_size(p.N)), kBlock, 0, stream>>>(p);
  };
  with_shape(p, launch, p.x, p.d_y);
  check_launch("short_convolution_backward, initial state");
}

}  // namespace gdn::kernels::cuda
