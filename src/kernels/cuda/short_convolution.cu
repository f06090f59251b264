// The short convolution: a thread owns a few channels and walks over a run of tokens with the last
// inputs in registers and the next ones on their way, from sequence to sequence where they are
// packed. A block has neighbouring channels of a few runs.
//
// Kernels are compiled for 4 taps, and for 8, of which fewer are the last ones, behind taps that
// are missing.
#include <gdn/kernels/cuda/column_sums.cuh>
#include <gdn/kernels/cuda/short_convolution.h>
#include <gdn/kernels/cuda/short_convolution_channels.cuh>

namespace gdn::kernels::cuda {
namespace {

using namespace convolution;

constexpr int kRuns = 4;  // of tokens, of a block
constexpr int kBlock = kRuns * kWarp;
constexpr int64_t kBytes = 8;  // of a token's channels of a thread
// Of a run; backward, the W - 1 behind them are computed twice.
constexpr int64_t kForwardTokens = 64, kBackwardTokens = 128;
constexpr int kForwardAhead = 8, kBackwardAhead = 4;  // tokens whose inputs are on their way
// Blocks of a multiprocessor, at least: 128 and 168 registers a thread. More blocks spill.
constexpr int kForwardBlocks = 4, kBackwardBlocks = 3;

/// Where a thread works: its first channel, and its run of tokens.
template <int kChannels>
struct Place {
  int64_t d, begin, end;

  __device__ Place(const ShortConvolutionProblem& p, int64_t tokens)
      : d((int64_t{blockIdx.x} * kWarp + threadIdx.x % kWarp) * kChannels),
        begin((int64_t{blockIdx.y} * kRuns + threadIdx.x / kWarp) * tokens),
        end(min(p.T, begin + tokens)) {}
};

/// Grid: channels, then runs of tokens, then batch rows.
template <typename T, int kTaps, int kChannels>
__global__ void __launch_bounds__(kBlock, kForwardBlocks)
    convolution_kernel(ShortConvolutionForward p) {
  constexpr int kAhead = kForwardAhead;
  const Place<kChannels> place(p, kForwardTokens);
  if (place.d >= p.D || place.begin >= p.T) return;
  Channels<T, kTaps, kChannels> channels(p, place.d);
  for (int64_t b = blockIdx.z; b < p.B; b += gridDim.z) {
    Sequence s;
    for (int64_t t = place.begin; t < place.end; t = s.end) {
      s = sequence_of(p, b, t);
      const int count = static_cast<int>(min(s.end, place.end) - t);
      Tokens<T, kChannels, kAhead> x(p.x, s, t, place.d, count);
      channels.start(s, t);
      Cursor<T> to(p.y, b, t, place.d);
      // kAhead tokens. kMore: all of them and those that are loaded have another one behind them.
      const auto step = [&]<bool kMore>(int first) {
#pragma unroll
        for (int j = 0; j < kAhead; ++j) {
          channels.push(x.template next<kMore>(j));
          float y[kChannels];
#pragma unroll
          for (int c = 0; c < kChannels; ++c) {
            const float z = channels.sum(c);
            y[c] = p.silu ? silu(z) : z;
          }
          if (kMore || first + j < count) store<kChannels>(to.at, y);
          to.advance();
        }
      };
      int i = 0;
      for (; i + 2 * kAhead < count; i += kAhead) step.template operator()<true>(i);
      for (; i < count; i += kAhead) step.template operator()<false>(i);
    }
    if (p.final_state != nullptr) {
      channels.start(s, s.end);
      channels.store_final(s.n, p.final_state);
    }
  }
}

/// The thread's channels in a kernel whose grid is channels, then sequences.
template <int kChannels>
__device__ int64_t thread_channel() {
  return (int64_t{blockIdx.x} * kBlock + threadIdx.x) * kChannels;
}

/// Grid: channels, then sequences.
template <typename T, int kTaps, int kChannels>
__global__ void __launch_bounds__(kBlock) final_state_kernel(ShortConvolutionForward p) {
  const int64_t d = thread_channel<kChannels>();
  if (d >= p.D) return;
  Channels<T, kTaps, kChannels> channels(p, d);
  for (int64_t n = blockIdx.y; n < p.N; n += gridDim.y) {
    const Sequence s = sequence_at(p, n);
    channels.start(s, s.end);
    channels.store_final(n, p.final_state);
  }
}

/// d_z from d_y, at the token whose inputs `channels` holds.
template <typename T, int kTaps, int kChannels>
__device__ void sum_gradient(const ShortConvolutionBackward& p,
                             const Channels<T, kTaps, kChannels>& channels,
                             const Vector<T, kChannels>& d_y, float (&d_z)[kChannels]) {
  unpack(d_y, d_z);
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

/// Grid: channels, then runs of tokens, then batch rows. A run goes on for kTaps - 1 tokens behind
/// its own, within the last one's sequence. parts [B, blocks of runs, W + 1, D]: the sums of
/// d_weight and d_bias over the block's own tokens.
template <typename T, int kTaps, int kChannels>
__global__ void __launch_bounds__(kBlock, kBackwardBlocks)
    convolution_backward_kernel(ShortConvolutionBackward p, float* parts) {
  constexpr int kAhead = kBackwardAhead;
  constexpr int kColumns = kWarp * kChannels;
  __shared__ float sums[kRuns][kTaps + 1][kColumns];
  const Place<kChannels> place(p, kBackwardTokens);
  const bool idle = place.d >= p.D;
  Channels<T, kTaps, kChannels> channels(p, idle ? 0 : place.d);
  const int missing = channels.missing();
  for (int64_t b = blockIdx.z; b < p.B; b += gridDim.z) {
    float d_weight[kTaps][kChannels] = {}, d_bias[kChannels] = {};
    Sequence s;
    for (int64_t begin = place.begin; begin < place.end && !idle; begin = s.end) {
      s = sequence_of(p, b, begin);
      const int own = static_cast<int>(min(s.end, place.end) - begin);
      const int count = static_cast<int>(min(s.end - begin, int64_t{own} + kTaps - 1));
      Tokens<T, kChannels, kAhead> x(p.x, s, begin, place.d, count);
      Tokens<T, kChannels, kAhead> d_y(p.d_y, s, begin, place.d, count);
      channels.start(s, begin);
      GradientWindow<kTaps, kChannels> window;
      window.clear();
      Cursor<T> to(p.d_x, b, begin, place.d);
      // kAhead tokens. kInner: all are the run's own, as are those whose d_x they complete, and
      // those that are loaded have another one behind them.
      const auto step = [&]<bool kInner>(int first) {
#pragma unroll
        for (int j = 0; j < kAhead; ++j) {
          const int i = first + j;
          channels.push(x.template next<kInner>(j));
          float d_z[kChannels];
          sum_gradient(p, channels, d_y.template next<kInner>(j), d_z);
#pragma unroll
          for (int c = 0; c < kChannels; ++c) {
            if (!kInner && i >= count) d_z[c] = 0.0F;  // behind the sequence
            const float d_own = kInner || i < own ? d_z[c] : 0.0F;
#pragma unroll
            for (int w = 0; w < kTaps; ++w) {
              d_weight[w][c] = fmaf(channels.x[w][c], d_own, d_weight[w][c]);
            }
            d_bias[c] += d_own;
          }
          window.push(d_z);
          const int at = i - (kTaps - 1);  // d_x is complete there
          if (!kInner && (at < 0 || at >= own)) continue;
          float d_x[kChannels];
#pragma unroll
          for (int c = 0; c < kChannels; ++c) {
            d_x[c] = 0.0F;
#pragma unroll
            for (int w = 0; w < kTaps; ++w) {
              if (w < missing) continue;  // d_z may be NaN
              d_x[c] = fmaf(channels.weight[w][c], window.d_z[kTaps - 1 - w][c], d_x[c]);
            }
          }
          if (!kInner && p.d_final_state != nullptr) {
            const int64_t in_final = begin + at - (s.end - (p.W - 1));
#pragma unroll
            for (int c = 0; c < kChannels && in_final >= 0; ++c) {
              d_x[c] += to_float(static_cast<const T*>(
                  p.d_final_state)[(s.n * p.D + place.d + c) * (p.W - 1) + in_final]);
            }
          }
          store<kChannels>(to.at, d_x);
          to.advance();
        }
      };
      constexpr int kWarmUp = (kTaps - 1 + kAhead - 1) / kAhead * kAhead;
      int i = 0;
      for (; i < kWarmUp; i += kAhead) step.template operator()<false>(i);
      for (; i + 2 * kAhead < count && i + kAhead <= own; i += kAhead) {
        step.template operator()<true>(i);
      }
      for (; i < own + kTaps - 1; i += kAhead) step.template operator()<false>(i);
    }
    const int run = static_cast<int>(threadIdx.x) / kWarp;
    const int column = static_cast<int>(threadIdx.x) % kWarp * kChannels;
    __syncthreads();  // whoever still adds up the last batch row's
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
#pragma unroll
      for (int w = 0; w < kTaps; ++w) sums[run][w][column + c] = d_weight[w][c];
      sums[run][kTaps][column + c] = d_bias[c];
    }
    __syncthreads();
    float* part = parts + (b * gridDim.y + blockIdx.y) * p.D * (p.W + 1);
    for (int i = static_cast<int>(threadIdx.x); i < (kTaps + 1) * kColumns; i += kBlock) {
      const int w = i / kColumns;
      const int64_t d = int64_t{blockIdx.x} * kColumns + i % kColumns;
      if (w < missing || d >= p.D) continue;
      float sum = 0.0F;
#pragma unroll
      for (int r = 0; r < kRuns; ++r) sum += sums[r][w][i % kColumns];
      part[(w - missing) * p.D + d] = sum;
    }
  }
}

/// Grid: channels, then sequences. What reaches the initial state: the first sums, and the final
/// state where the sequence is shorter than it.
template <typename T, int kTaps, int kChannels>
__global__ void __launch_bounds__(kBlock) initial_gradient_kernel(ShortConvolutionBackward p) {
  const int64_t d = thread_channel<kChannels>();
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
        const auto at = [&](const ConstView3& view) {
          return load_constant<kChannels>(static_cast<const T*>(view.data) + s.b * view.stride_b +
                                          (s.begin + t) * view.stride_t + d);
        };
        channels.push(at(p.x));
        sum_gradient(p, channels, at(p.d_y), d_z[t]);
      } else {
#pragma unroll
        for (int c = 0; c < kChannels; ++c) d_z[t][c] = 0.0F;
      }
    }
    // Token a - kTaps + 1 before the start meets the sum of token t with weight a - t.
#pragma unroll
    for (int a = 0; a < kTaps - 1; ++a) {
      const int64_t i = a - channels.missing();  // in the state
      if (i < 0) continue;
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        float sum = 0.0F;
#pragma unroll
        for (int t = 0; t <= a; ++t) {
          if (a - t < channels.missing()) continue;
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

/// d_weight [D, W] and d_bias [D] from sums [W + 1, D].
struct WriteGradients {
  ShortConvolutionBackward p;
  __device__ void operator()(int64_t column, float sum) const {
    const int64_t w = column / p.D, d = column % p.D;
    if (w < p.W) {
      if (p.d_weight != nullptr) static_cast<float*>(p.d_weight)[d * p.W + w] = sum;
    } else {
      if (p.d_bias != nullptr) static_cast<float*>(p.d_bias)[d] = sum;
    }
  }
};

/// Calls body with the element type, taps and channels of a thread as constants: kBytes of them
/// with 4 taps and half as many with 8, which need twice the registers, or one where that does not
/// fit.
template <typename Body, typename... Views>
void with_shape(const ShortConvolutionProblem& p, const Body& body, const Views&... views) {
  if (p.W < kMinTaps || p.W > kMaxTaps) {
    throw std::invalid_argument("short_convolution: W must be 2 to 8, got " + std::to_string(p.W));
  }
  with_element_type(p.dtype, [&]<typename T>(T*) {
    const auto with_taps = [&]<int kTaps>() {
      constexpr int64_t kAccess = std::max<int64_t>(sizeof(T), kTaps == 4 ? kBytes : kBytes / 2);
      constexpr int kChannels = kAccess / sizeof(T);
      const bool aligned = ((rows_aligned<T>(views.data, views.stride_t, kAccess) &&
                             rows_aligned<T>(views.data, views.stride_b, kAccess)) &&
                            ...);
      if constexpr (kChannels > 1) {
        if (p.D % kChannels == 0 && aligned && rows_aligned<T>(p.weight, 0, 16)) {
          return body.template operator()<T, kTaps, kChannels>();
        }
      }
      body.template operator()<T, kTaps, 1>();
    };
    if (p.W == 4) {
      with_taps.template operator()<4>();
    } else {
      with_taps.template operator()<8>();
    }
  });
}

/// Grid sizes beyond the first are limited; kernels loop over what is more, except token blocks.
unsigned grid_size(int64_t count) {
  return static_cast<unsigned>(std::clamp<int64_t>(count, 1, 65535));
}

/// Of channels, then of runs of `tokens` tokens, then batch rows.
dim3 run_grid(const ShortConvolutionProblem& p, int channels, int64_t tokens) {
  const int64_t blocks = divide_up(p.T, kRuns * tokens);
  if (blocks > 65535) {
    throw std::invalid_argument("short_convolution: T must be at most " +
                                std::to_string(65535 * kRuns * tokens) + ", got " +
                                std::to_string(p.T));
  }
  return {static_cast<unsigned>(divide_up(p.D, int64_t{kWarp} * channels)),
          static_cast<unsigned>(blocks), grid_size(p.B)};
}

/// Of channels, then of sequences.
dim3 sequence_grid(const ShortConvolutionProblem& p, int channels) {
  return {static_cast<unsigned>(divide_up(p.D, int64_t{kBlock} * channels)), grid_size(p.N)};
}

}  // namespace

void short_convolution(const ShortConvolutionForward& problem, Stream stream) {
  ShortConvolutionForward p = problem;
  if (p.D == 0 || p.N == 0) return;
  // A thread that sees a whole sequence can write its final state, even over the initial one.
  const bool whole_sequences = p.cu_seqlens == nullptr && p.T > 0 && p.T <= kForwardTokens;
  if (!whole_sequences) p.final_state = nullptr;
  if (p.B > 0 && p.T > 0) {
    const auto launch = [&]<typename T, int kTaps, int kChannels>() {
      convolution_kernel<T, kTaps, kChannels>
          <<<run_grid(p, kChannels, kForwardTokens), kBlock, 0, stream>>>(p);
    };
    with_shape(p, launch, p.x, p.y);
    check_launch("short_convolution");
  }
  if (whole_sequences || problem.final_state == nullptr) return;
  const auto launch = [&]<typename T, int kTaps, int kChannels>() {
    final_state_kernel<T, kTaps, kChannels>
        <<<sequence_grid(p, kChannels), kBlock, 0, stream>>>(problem);
  };
  with_shape(p, launch, p.x);
  check_launch("short_convolution, final state");
}

int64_t short_convolution_backward_scratch(const ShortConvolutionBackward& p) {
  return scratch_floats(p.B * divide_up(p.T, kRuns * kBackwardTokens) * p.D * (p.W + 1));
}

void short_convolution_backward(const ShortConvolutionBackward& p, void* scratch, Stream stream) {
  if (p.D == 0) return;
  const int64_t count = p.B * divide_up(p.T, kRuns * kBackwardTokens);
  auto* parts = static_cast<float*>(scratch);
  if (count > 0) {
    const auto launch = [&]<typename T, int kTaps, int kChannels>() {
      convolution_backward_kernel<T, kTaps, kChannels>
          <<<run_grid(p, kChannels, kBackwardTokens), kBlock, 0, stream>>>(p, parts);
    };
    with_shape(p, launch, p.x, p.d_y, p.d_x);
    check_launch("short_convolution_backward");
  }
  if (p.d_weight != nullptr || p.d_bias != nullptr) {
    add_parts(parts, count, p.D * (p.W + 1), stream, WriteGradients{p});
  }
  if (p.d_initial_state == nullptr || p.N == 0) return;
  const auto launch = [&]<typename T, int kTaps, int kChannels>() {
    initial_gradient_kernel<T, kTaps, kChannels>
        <<<sequence_grid(p, kChannels), kBlock, 0, stream>>>(p);
  };
  with_shape(p, launch, p.x, p.d_y);
  check_launch("short_convolution_backward, initial state");
}

}  // namespace gdn::kernels::cuda
