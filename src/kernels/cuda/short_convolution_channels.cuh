// What a thread of the short convolution's kernels holds: the sequence it is in, its channels with
// their weights and last inputs, and the inputs of the next tokens.
#pragma once

#include <gdn/kernels/cuda/device.cuh>
#include <gdn/kernels/short_convolution.h>

namespace gdn::kernels::cuda::convolution {

/// The sequence that a token belongs to: index, first token, the one after the last, batch row.
struct Sequence {
  int64_t n, begin, end, b;
};

/// The sequence of token t of batch row b; t < T.
inline __device__ Sequence sequence_of(const ShortConvolutionProblem& p, int64_t b, int64_t t) {
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

inline __device__ Sequence sequence_at(const ShortConvolutionProblem& p, int64_t n) {
  if (p.cu_seqlens == nullptr) return {n, 0, p.T, n};
  return {n, p.cu_seqlens[n], p.cu_seqlens[n + 1], 0};
}

template <typename T, int kTaps, int kChannels>
struct Channels {
  const ShortConvolutionProblem& p;
  int64_t d;  // the first channel
  float weight[kTaps][kChannels];
  float bias[kChannels];
  float x[kTaps][kChannels];  // the inputs at tokens t - kTaps + 1 to t

  __device__ Channels(const ShortConvolutionProblem& p, int64_t d) : p(p), d(d) {
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      float taps[kTaps] = {};
      if constexpr (kTaps == 4 && kChannels > 1) {
        load_parameter<T>(p.weight, p.weight_dtype, (d + c) * kTaps, taps);
      } else {
#pragma unroll
        for (int w = 0; w < kTaps; ++w) {
          float tap[1];
          if (w < missing()) continue;
          load_parameter<T>(p.weight, p.weight_dtype, (d + c) * p.W + w - missing(), tap);
          taps[w] = tap[0];
        }
      }
#pragma unroll
      for (int w = 0; w < kTaps; ++w) weight[w][c] = taps[w];
      float value[1] = {0.0F};
      if (p.bias != nullptr) load_parameter<T>(p.bias, p.weight_dtype, d + c, value);
      bias[c] = value[0];
    }
  }

  /// Of the kTaps.
  __device__ int missing() const { return kTaps == 4 ? 0 : kTaps - static_cast<int>(p.W); }

  /// The inputs at token t; those before the sequence come from its initial state.
  __device__ void input(const Sequence& s, int64_t t, float (&values)[kChannels]) const {
    if (t >= s.begin) {
      const T* from = static_cast<const T*>(p.x.data) + s.b * p.x.stride_b + t * p.x.stride_t + d;
      unpack(load_constant<kChannels>(from), values);
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

  /// Moves on to the next token, whose inputs these are.
  __device__ void push(const Vector<T, kChannels>& next) {
#pragma unroll
    for (int w = 0; w + 1 < kTaps; ++w) {
#pragma unroll
      for (int c = 0; c < kChannels; ++c) x[w][c] = x[w + 1][c];
    }
    unpack(next, x[kTaps - 1]);
  }

  /// The sum before the activation.
  __device__ float sum(int c) const {
    float z = bias[c];
#pragma unroll
    for (int w = 0; w < kTaps; ++w) {
      if (w >= missing()) z = fmaf(weight[w][c], x[w][c], z);  // else x may be NaN
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
        if (w <= missing()) continue;
        static_cast<T*>(final_state)[(n * p.D + d + c) * (p.W - 1) + w - 1 - missing()] =
            from_float<T>(x[w][c]);
      }
    }
  }
};

/// A thread's channels of a token, and the bytes to the next token's: a step is one addition of a
/// number that all threads share.
template <typename T>
struct Cursor {
  T* at;
  int64_t step;

  template <typename Void>
  __device__ Cursor(const View3<Void>& view, int64_t b, int64_t t, int64_t d)
      : at(static_cast<T*>(view.data) + b * view.stride_b + t * view.stride_t + d),
        step(view.stride_t * static_cast<int64_t>(sizeof(T))) {}
  __device__ void advance(bool really = true) {
    using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
    at = reinterpret_cast<T*>(reinterpret_cast<Byte*>(at) + (really ? step : 0));
  }
};

/// A tensor's channels at one token after another, the next kAhead of which are on their way.
template <typename T, int kChannels, int kAhead>
struct Tokens {
  Cursor<const T> from;
  int left;  // tokens behind the one at `from`
  Vector<T, kChannels> ahead[kAhead];

  __device__ Tokens(const ConstView3& view, const Sequence& s, int64_t t, int64_t d, int count)
      : from(view, s.b, t, d), left(count - 1) {
#pragma unroll
    for (int j = 0; j < kAhead; ++j) load<false>(j);
  }
  /// kMore: the token is not the last one. That comes again and again, so that no load waits for a
  /// branch.
  template <bool kMore>
  __device__ void load(int j) {
    ahead[j] = load_constant<kChannels>(from.at);
    from.advance(kMore || left > 0);
    --left;
  }
  /// The next token's; j counts them, modulo kAhead.
  template <bool kMore>
  __device__ Vector<T, kChannels> next(int j) {
    const Vector<T, kChannels> value = ahead[j];
    load<kMore>(j);
    return value;
  }
};

}  // namespace gdn::kernels::cuda::convolution
