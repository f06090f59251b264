// Products of small fp32 tiles that live in cache: register-blocked micro-kernels, and transposes.
//
// Included once per instruction set (Highway's foreach_target), hence the unusual guard.

#if defined(GDN_KERNELS_CPU_MATMUL_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef GDN_KERNELS_CPU_MATMUL_INL_H_
#undef GDN_KERNELS_CPU_MATMUL_INL_H_
#else
#define GDN_KERNELS_CPU_MATMUL_INL_H_
#endif

#include <algorithm>
#include <cstdint>

#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace gdn::kernels::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

/// Vectors of 16 floats at most: tile widths are multiples of kTileAlign for every instruction set.
using F32 = hn::CappedTag<float, 16>;
inline constexpr int64_t kTileAlign = 16;

/// Width of a tile row for n columns. An odd number of cache lines, so that the rows of a column
/// panel spread over all sets of the L1 cache.
inline constexpr int64_t padded(int64_t n) {
  return (n + kTileAlign - 1) / kTileAlign * kTileAlign;
}
inline constexpr int64_t tile_stride(int64_t n) {
  return (padded(n) / kTileAlign | 1) * kTileAlign;
}

/// A row-major fp32 tile. Columns up to padded(n) exist and are zero beyond n.
struct Tile {
  float* data = nullptr;
  int64_t stride = 0;
  float* row(int64_t i) const { return data + i * stride; }
};

/// The left factor, read element by element: any strides, so a transposed tile costs nothing.
struct LeftFactor {
  const float* data = nullptr;
  int64_t row_stride = 0;
  int64_t column_stride = 0;
};
HWY_INLINE LeftFactor plain(const Tile& t) { return {t.data, t.stride, 1}; }
HWY_INLINE LeftFactor transposed(const Tile& t) { return {t.data, 1, t.stride}; }

/// Rows of C that one micro-kernel holds in registers, two vectors wide.
inline constexpr int64_t kMicroRows = HWY_TARGET <= HWY_AVX3 || HWY_ARCH_ARM_A64 ? 8 : 4;

/// What is known to be zero, or not wanted, and is skipped in steps of kMicroRows.
enum class Skip {
  none,
  a_above_diagonal,  ///< A is lower triangular
  a_below_diagonal,  ///< A is upper triangular
  c_above_diagonal,  ///< only the lower triangle of C is wanted; the rest is left undefined
};

/// How the product enters C.
enum class Into { set, add, subtract };

template <int kRows, int kVectors, Into kInto>
HWY_INLINE void micro_kernel(int64_t k_begin, int64_t k_end, const LeftFactor& a, const Tile& b,
                             int64_t column, float c_scale, float* HWY_RESTRICT c,
                             int64_t c_stride) {
  const F32 d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  using Vec = hn::Vec<F32>;
  Vec sum[kRows][kVectors];
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kVectors; ++j) sum[i][j] = hn::Zero(d);
  }
  const float* HWY_RESTRICT b_row = b.data + k_begin * b.stride + column;
  const float* HWY_RESTRICT a_column = a.data + k_begin * a.column_stride;
  for (int64_t k = k_begin; k < k_end; ++k, b_row += b.stride, a_column += a.column_stride) {
    Vec right[kVectors];
    for (int j = 0; j < kVectors; ++j) right[j] = hn::Load(d, b_row + j * lanes);
    for (int i = 0; i < kRows; ++i) {
      const Vec left = hn::Set(d, a_column[i * a.row_stride]);
      for (int j = 0; j < kVectors; ++j) sum[i][j] = hn::MulAdd(left, right[j], sum[i][j]);
    }
  }
  const Vec keep = hn::Set(d, c_scale);
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kVectors; ++j) {
      float* out = c + i * c_stride + j * lanes;
      if constexpr (kInto == Into::set) hn::Store(sum[i][j], d, out);
      if constexpr (kInto == Into::add)
        hn::Store(hn::MulAdd(keep, hn::Load(d, out), sum[i][j]), d, out);
      if constexpr (kInto == Into::subtract)
        hn::Store(hn::Sub(hn::Load(d, out), sum[i][j]), d, out);
    }
  }
}

/// C [m, n] = A [m, k] B [k, n] (set), c_scale C + A B (add) or C - A B (subtract).
/// m is a multiple of kMicroRows, n of kTileAlign; k is any.
template <Into kInto, Skip kSkip = Skip::none>
HWY_NOINLINE void matmul(int64_t m, int64_t n, int64_t k, LeftFactor a, const Tile& b,
                         const Tile& c, float c_scale = 1.0F) {
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(F32()));
  const int64_t panel = 2 * lanes;
  for (int64_t column = 0; column < n; column += panel) {
    for (int64_t i = 0; i < m; i += kMicroRows) {
      const int64_t row_end = i + kMicroRows;
      if (kSkip == Skip::c_above_diagonal && column >= row_end) continue;
      const int64_t k_begin = kSkip == Skip::a_below_diagonal ? i : 0;
      const int64_t k_end = kSkip == Skip::a_above_diagonal ? std::min(k, row_end) : k;
      const LeftFactor a_rows = {a.data + i * a.row_stride, a.row_stride, a.column_stride};
      float* c_block = c.row(i) + column;
      if (column + panel <= n) {
        micro_kernel<kMicroRows, 2, kInto>(k_begin, k_end, a_rows, b, column, c_scale, c_block,
                                           c.stride);
      } else {
        micro_kernel<kMicroRows, 1, kInto>(k_begin, k_end, a_rows, b, column, c_scale, c_block,
                                           c.stride);
      }
    }
  }
}

/// to [columns, rows] = from [rows, columns]^T; both counts are multiples of 4.
inline void transpose(int64_t rows, int64_t columns, const Tile& from, const Tile& to) {
  const hn::Full128<float> d;
  const hn::Repartition<double, decltype(d)> pairs;
  for (int64_t j = 0; j < columns; j += 4) {
    for (int64_t i = 0; i < rows; i += 4) {
      const auto r0 = hn::Load(d, from.row(i) + j), r1 = hn::Load(d, from.row(i + 1) + j);
      const auto r2 = hn::Load(d, from.row(i + 2) + j), r3 = hn::Load(d, from.row(i + 3) + j);
      const auto low01 = hn::BitCast(pairs, hn::InterleaveLower(d, r0, r1));
      const auto low23 = hn::BitCast(pairs, hn::InterleaveLower(d, r2, r3));
      const auto high01 = hn::BitCast(pairs, hn::InterleaveUpper(d, r0, r1));
      const auto high23 = hn::BitCast(pairs, hn::InterleaveUpper(d, r2, r3));
      hn::Store(hn::BitCast(d, hn::InterleaveLower(pairs, low01, low23)), d, to.row(j) + i);
      hn::Store(hn::BitCast(d, hn::InterleaveUpper(pairs, low01, low23)), d, to.row(j + 1) + i);
      hn::Store(hn::BitCast(d, hn::InterleaveLower(pairs, high01, high23)), d, to.row(j + 2) + i);
      hn::Store(hn::BitCast(d, hn::InterleaveUpper(pairs, high01, high23)), d, to.row(j + 3) + i);
    }
  }
}

}  // namespace gdn::kernels::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // include guard
