#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <vector>

#include <gdn/kernels/cpu/element_type.h>
#include <gdn/kernels/cpu/rows.h>
#include <gdn/kernels/cpu/small_batch_linear.h>
#include <gdn/kernels/short_convolution.h>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "gdn/kernels/cpu/small_batch_linear.cpp"
#include <hwy/cache_control.h>
#include <hwy/foreach_target.h>  // IWYU pragma: keep

#include <gdn/kernels/cpu/simd-inl.h>

#ifndef GDN_KERNELS_CPU_SMALL_BATCH_LINEAR_ONCE
#define GDN_KERNELS_CPU_SMALL_BATCH_LINEAR_ONCE
namespace gdn::kernels::cpu {

/// Outputs that are finished together.
inline constexpr int64_t kOutputs = 32;
/// Inputs of a weight that are fetched ahead together, and at most so many have one scale.
inline constexpr int64_t kSpan = 128;

/// z [M, D] in fp32.
struct NormedRows {
  float* data;
  int64_t stride;  ///< whole vectors of any instruction set; behind D are zeros

  const float* row(int64_t m) const { return data + m * stride; }
};

}  // namespace gdn::kernels::cpu
#endif

HWY_BEFORE_NAMESPACE();
namespace gdn::kernels::cpu::HWY_NAMESPACE {

using F32 = hn::ScalableTag<float>;

// A tile is as many weight rows by batch rows as leave each sum a register.
#if HWY_TARGET <= HWY_AVX3 || HWY_ARCH_ARM
inline constexpr int kTileRows = 4;  // of 32 registers
#else
inline constexpr int kTileRows = 2;
#endif
inline constexpr int kTileBatch = 4;
/// Of one batch row: enough sums to hide a multiply-add's latency, and as many bytes of weight
/// between a line's fetching and its use as the caches hold.
template <typename Weight>
inline constexpr int kSingleRows = std::is_same_v<Weight, int8_t> ? 8 : 4;

/// z of rows [begin, end).
template <typename T>
void norm_rows(const SmallBatchLinear& p, const NormedRows& z, int64_t begin, int64_t end) {
  const F32 d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  const T* weight = static_cast<const T*>(p.norm_weight);
  const int64_t G = p.norm_weight != nullptr ? p.norm_size : p.D;
  for (int64_t m = begin; m < end; ++m) {
    const T* x = static_cast<const T*>(p.x.data) + m * p.x.stride;
    const T* gate = static_cast<const T*>(p.gate.data) + m * p.gate.stride;
    float* out = z.data + m * z.stride;
    std::fill(out + p.D, out + z.stride, 0.0F);
    for (int64_t first = 0; first < p.D; first += G) {
      auto r = hn::Set(d, 1.0F);
      if (weight != nullptr) {
        auto squares = hn::Zero(d);
        for (int64_t i = 0; i < G; i += lanes) {
          const auto v = LoadF32(d, x + first + i, G - i);
          squares = hn::MulAdd(v, v, squares);
        }
        const float mean = hn::GetLane(hn::SumOfLanes(d, squares)) / static_cast<float>(G);
        r = hn::Set(d, 1.0F / std::sqrt(mean + static_cast<float>(p.eps)));
      }
      for (int64_t i = 0; i < G; i += lanes) {
        auto v = LoadF32(d, x + first + i, G - i);
        if (weight != nullptr) v = hn::Mul(hn::Mul(v, r), LoadF32(d, weight + i, G - i));
        if (p.gate.data != nullptr) v = hn::Mul(v, Silu(d, LoadF32(d, gate + first + i, G - i)));
        StoreF32(d, v, out + first + i, G - i);
      }
    }
  }
}

/// Products of kRows rows of the weight from `row` on with kBatch rows of z from `m` on. Each sum
/// is formed in the same order whatever kRows and kBatch are. sums: [batch, kOutputs].
template <typename Weight, int kRows, int kBatch>
HWY_INLINE void multiply_tile(const SmallBatchLinear& p, const NormedRows& z, int64_t row,
                              int64_t m, float* sums) {
  constexpr bool kScaled = std::is_same_v<Weight, int8_t>;
  constexpr int64_t kLine = 64 / sizeof(Weight);
  const F32 d;
  using Vec = hn::Vec<F32>;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  const int64_t D = p.D;
  const int64_t span = kScaled ? std::min(kSpan, p.scale_size) : kSpan;
  const int64_t groups = kScaled ? (D + p.scale_size - 1) / p.scale_size : 1;
  const Weight* const weight = static_cast<const Weight*>(p.weight) + row * D;
  const float* const values = z.row(m);
  Vec sum[kRows][kBatch], total[kRows][kBatch];
  for (int r = 0; r < kRows; ++r) {
    for (int b = 0; b < kBatch; ++b) sum[r][b] = total[r][b] = hn::Zero(d);
  }
  for (int64_t begin = 0; begin < D; begin += span) {
    const int64_t end = std::min(D, begin + span);
    // Rows are too short for the hardware to fetch the next ones ahead.
    for (int r = 0; r < kRows; ++r) {
      const Weight* const next = weight + (kRows + r) * D;
      for (int64_t i = begin; i < end; i += kLine) hwy::Prefetch(next + i);
    }
    int64_t i = begin;
    for (; i + lanes <= end; i += lanes) {
      Vec w[kRows];
      for (int r = 0; r < kRows; ++r) w[r] = LoadF32(d, weight + r * D + i);
      for (int b = 0; b < kBatch; ++b) {
        const Vec v = hn::LoadU(d, values + b * z.stride + i);
        for (int r = 0; r < kRows; ++r) sum[r][b] = hn::MulAdd(w[r], v, sum[r][b]);
      }
    }
    if (i < end) {
      for (int r = 0; r < kRows; ++r) {
        const Vec w = LoadF32(d, weight + r * D + i, end - i);
        for (int b = 0; b < kBatch; ++b) {
          sum[r][b] = hn::MulAdd(w, hn::LoadU(d, values + b * z.stride + i), sum[r][b]);
        }
      }
    }
    if constexpr (kScaled) {
      for (int r = 0; r < kRows; ++r) {
        const Vec scale = hn::Set(d, p.scales[(row + r) * groups + begin / p.scale_size]);
        for (int b = 0; b < kBatch; ++b) {
          total[r][b] = hn::MulAdd(sum[r][b], scale, total[r][b]);
          sum[r][b] = hn::Zero(d);
        }
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int b = 0; b < kBatch; ++b) {
      sums[b * kOutputs + r] = hn::GetLane(hn::SumOfLanes(d, kScaled ? total[r][b] : sum[r][b]));
    }
  }
}

/// `count` rows of the weight by kBatch rows of z.
template <typename Weight, int kRows, int kBatch>
void multiply_rows(const SmallBatchLinear& p, const NormedRows& z, int64_t row, int64_t count,
                   int64_t m, float* sums) {
  int64_t done = 0;
  for (; done + kRows <= count; done += kRows) {
    multiply_tile<Weight, kRows, kBatch>(p, z, row + done, m, sums + done);
  }
  for (; done < count; ++done) multiply_tile<Weight, 1, kBatch>(p, z, row + done, m, sums + done);
}

/// sums [M, kOutputs] of `count` rows of the weight from `row` on. Rows of the batch in the inner
/// loop: the weight comes from memory once, and then from the cache.
template <typename Weight>
void multiply(const SmallBatchLinear& p, const NormedRows& z, int64_t row, int64_t count,
              float* sums) {
  if (p.M == 1) return multiply_rows<Weight, kSingleRows<Weight>, 1>(p, z, row, count, 0, sums);
  for (int64_t done = 0; done < count; done += kTileRows) {
    const int64_t rows = std::min<int64_t>(kTileRows, count - done);
    for (int64_t m = 0; m < p.M; m += kTileBatch) {
      float* to = sums + m * kOutputs + done;
      const auto run = [&]<int kBatch>() {
        multiply_rows<Weight, kTileRows, kBatch>(p, z, row + done, rows, m, to);
      };
      switch (p.M - m) {
        case 1:
          run.template operator()<1>();
          break;
        case 2:
          run.template operator()<2>();
          break;
        case 3:
          run.template operator()<3>();
          break;
        default:
          run.template operator()<kTileBatch>();
      }
    }
  }
}

/// The convolution of the outputs from n on, as far as they are channels, and its state. y: their
/// sums, replaced by results.
template <typename T>
void convolve(const SmallBatchLinear& p, int64_t m, int64_t n, int64_t count, float* y) {
  const F32 d;
  const int64_t W = p.taps;
  float taps[kOutputs * kMaxTaps], inputs[kOutputs * kMaxTaps], bias[kOutputs] = {};
  T* state = static_cast<T*>(p.conv_state) + (m * p.channels + n) * (W - 1);
  ConvertElements(static_cast<const T*>(p.conv_weight) + n * W, taps, count * W);
  ConvertElements(state, inputs, count * (W - 1));
  if (p.conv_bias != nullptr) {
    ConvertElements(static_cast<const T*>(p.conv_bias) + n, bias, count);
  }
  for (int64_t j = 0; j < count; ++j) {
    float* past = inputs + j * (W - 1);
    float sum = bias[j];
    for (int64_t w = 0; w < W - 1; ++w) sum += taps[j * W + w] * past[w];
    sum += taps[j * W + W - 1] * y[j];
    std::memmove(past, past + 1, static_cast<size_t>(W - 2) * sizeof(float));
    past[W - 2] = y[j];
    y[j] = sum;
  }
  ConvertElements(inputs, state, count * (W - 1));
  for (int64_t j = 0; j < count; j += static_cast<int64_t>(hn::Lanes(d))) {
    StoreF32(d, Silu(d, LoadF32(d, y + j, count - j)), y + j, count - j);
  }
}

/// Outputs [n, n + count) of every row.
template <typename T>
void finish(const SmallBatchLinear& p, const NormedRows& z, int64_t n, int64_t count, float* sums) {
  const F32 d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  float* gates = sums;
  float* ups = sums + p.M * kOutputs;  // with swiglu
  if (p.scales != nullptr) {
    multiply<int8_t>(p, z, n, count, gates);
    if (p.swiglu) multiply<int8_t>(p, z, p.N + n, count, ups);
  } else {
    multiply<T>(p, z, n, count, gates);
    if (p.swiglu) multiply<T>(p, z, p.N + n, count, ups);
  }
  const int64_t convolved = std::clamp<int64_t>(p.channels - n, 0, count);
  for (int64_t m = 0; m < p.M; ++m) {
    float* sum = gates + m * kOutputs;
    if (convolved > 0) convolve<T>(p, m, n, convolved, sum);
    T* y = static_cast<T*>(p.y.data) + m * p.y.stride + n;
    for (int64_t i = 0; i < count; i += lanes) {
      auto v = LoadF32(d, sum + i, count - i);
      if (p.swiglu) {
        v = hn::Mul(Silu(d, v), LoadF32(d, ups + m * kOutputs + i, count - i));
      }
      if (p.residual.data != nullptr) {
        const T* residual = static_cast<const T*>(p.residual.data) + m * p.residual.stride + n;
        v = hn::Add(v, LoadF32(d, residual + i, count - i));
      }
      StoreF32(d, v, y + i, count - i);
    }
  }
}

void norm_range(const SmallBatchLinear& p, const NormedRows& z, int64_t begin, int64_t end) {
  with_element_type(p.dtype, [&]<typename T>(T*) { norm_rows<T>(p, z, begin, end); });
}

/// Outputs [begin, end).
void output_range(const SmallBatchLinear& p, const NormedRows& z, int64_t begin, int64_t end) {
  std::vector<float> sums(static_cast<size_t>(p.M * kOutputs * (p.swiglu ? 2 : 1)));
  with_element_type(p.dtype, [&]<typename T>(T*) {
    for (int64_t n = begin; n < end; n += kOutputs) {
      finish<T>(p, z, n, std::min(kOutputs, end - n), sums.data());
    }
  });
}

}  // namespace gdn::kernels::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace gdn::kernels::cpu {

HWY_EXPORT(norm_range);
HWY_EXPORT(output_range);

void small_batch_linear(const SmallBatchLinear& p) {
  constexpr int64_t kLanes = 64;  // no instruction set has longer vectors
  const int64_t stride = (p.D + kLanes - 1) / kLanes * kLanes;
  std::vector<float> memory(static_cast<size_t>(p.M * stride));
  const NormedRows z{memory.data(), stride};
  for_rows(p.parallel_for, p.M, p.D, [&](int64_t begin, int64_t end) {
    HWY_DYNAMIC_DISPATCH(norm_range)(p, z, begin, end);
  });
  const int64_t blocks = (p.N + kOutputs - 1) / kOutputs;
  for_rows(p.parallel_for, blocks, kOutputs * p.D * p.M, [&](int64_t begin, int64_t end) {
    HWY_DYNAMIC_DISPATCH(output_range)(p, z, begin * kOutputs, std::min(end * kOutputs, p.N));
  });
}

}  // namespace gdn::kernels::cpu
#endif  // HWY_ONCE
