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
#include <type_traits>

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

/// Rows of C that one micro-kernel holds in registers, and vectors of columns at most.
inline constexpr int64_t kMicroRows = HWY_TARGET <= HWY_AVX3 || HWY_ARCH_ARM_A64 ? 8 : 4;
inline constexpr int kMicroVectors = 3;

/// What is known to be zero, or not wanted, and is skipped in steps of kMicroRows.
enum class Skip {
  none,
  a_above_diagonal,  ///< A is lower triangular
  a_below_diagonal,  ///< A is upper triangular
  c_above_diagonal,  ///< only the lower triangle of C is wanted; the rest is left undefined
};

/// How the product enters C: instead of what C holds, or added to it.
enum class Into { set, add };

/// Factors of what enters C.
struct Factors {
  const float* rows = nullptr;  ///< of each row of A B; null: one
  float keep = 1.0F;            ///< of what C holds
  Tile old = {};                ///< what is read in place of what C holds, where it has memory
};

/// sum[i][j] += rows of A [., k_begin to k_end) times some vectors of columns of B.
template <int kRows, int kVectors>
HWY_INLINE void accumulate(int64_t k_begin, int64_t k_end, const LeftFactor& a, const Tile& b,
                           int64_t column, hn::Vec<F32> (&sum)[kRows][kVectors]) {
  const F32 d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  using Vec = hn::Vec<F32>;
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
}

template <int kRows, int kVectors, Into kInto>
HWY_INLINE void micro_kernel(int64_t k_begin, int64_t k_end, const LeftFactor& a, const Tile& b,
                             int64_t column, const float* factors, float keep, const Tile& old,
                             const Tile& c) {
  const F32 d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  using Vec = hn::Vec<F32>;
  Vec sum[kRows][kVectors];
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kVectors; ++j) sum[i][j] = hn::Zero(d);
  }
  accumulate<kRows, kVectors>(k_begin, k_end, a, b, column, sum);
  const Vec kept = hn::Set(d, keep);
  for (int i = 0; i < kRows; ++i) {
    const Vec factor = hn::Set(d, factors == nullptr ? 1.0F : factors[i]);
    for (int j = 0; j < kVectors; ++j) {
      float* out = c.row(i) + j * lanes;
      const Vec product = hn::Mul(factor, sum[i][j]);
      if constexpr (kInto == Into::set) hn::Store(product, d, out);
      if constexpr (kInto == Into::add) {
        hn::Store(hn::MulAdd(kept, hn::Load(d, old.row(i) + j * lanes), product), d, out);
      }
    }
  }
}

/// Memory that is wanted soon, as regions of rows. Products fetch it into the L2 cache while they
/// compute: the rows of one head are pages apart, where no hardware looks ahead.
class Ahead {
 public:
  void clear() {
    regions_ = 0;
    next_ = end_ = nullptr;
  }
  /// `rows` rows of `bytes` bytes. What is added last is fetched first.
  void add(const void* data, int64_t rows, int64_t stride, int64_t bytes) {
    region_[regions_++] = {static_cast<const uint8_t*>(data), rows, stride, bytes};
  }
  HWY_INLINE void fetch(int64_t lines) {
    for (; lines > 0 && (next_ < end_ || next_row()); --lines, next_ += kLine) {
      __builtin_prefetch(next_, /*for reading*/ 0, /*into L2*/ 2);
    }
  }

 private:
  static constexpr int64_t kLine = 64;
  struct Region {
    const uint8_t* row;
    int64_t rows, stride, bytes;
  };
  bool next_row() {
    if (regions_ == 0) return false;
    Region& r = region_[regions_ - 1];
    next_ = r.row;
    end_ = r.row + r.bytes;
    r.row += r.stride;
    if (--r.rows == 0) --regions_;
    return true;
  }

  Region region_[4] = {};
  int regions_ = 0;
  const uint8_t* next_ = nullptr;
  const uint8_t* end_ = nullptr;
};

/// C [m, n] = diag(factors.rows) A [m, k] B [k, n] (set), or factors.keep C + that (add).
/// m is a multiple of kMicroRows, n of kTileAlign; k is any.
template <Into kInto, Skip kSkip = Skip::none>
HWY_NOINLINE void matmul(Ahead& ahead, int64_t m, int64_t n, int64_t k, LeftFactor a, const Tile& b,
                         const Tile& c, const Factors& factors = {}) {
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(F32()));
  const Tile& old = factors.old.data == nullptr ? c : factors.old;
  for (int64_t column = 0, vectors; column < n; column += vectors * lanes) {
    const int64_t left = (n - column) / lanes;
    vectors = left == 4 ? 2 : std::min<int64_t>(kMicroVectors, left);  // one alone would be slow
    for (int64_t i = 0; i < m; i += kMicroRows) {
      const int64_t row_end = i + kMicroRows;
      if (kSkip == Skip::c_above_diagonal && column >= row_end) continue;
      const int64_t k_begin = kSkip == Skip::a_below_diagonal ? i : 0;
      const int64_t k_end = kSkip == Skip::a_above_diagonal ? std::min(k, row_end) : k;
      const LeftFactor a_rows = {a.data + i * a.row_stride, a.row_stride, a.column_stride};
      const float* of_rows = factors.rows == nullptr ? nullptr : factors.rows + i;
      const Tile c_block = {c.row(i) + column, c.stride};
      const Tile old_block = {old.row(i) + column, old.stride};
      ahead.fetch(kMicroRows * vectors * lanes / 16);
      const auto multiply = [&](auto count) HWY_ATTR {
        micro_kernel<kMicroRows, count, kInto>(k_begin, k_end, a_rows, b, column, of_rows,
                                               factors.keep, old_block, c_block);
      };
      if (vectors == 3) multiply(std::integral_constant<int, 3>());
      if (vectors == 2) multiply(std::integral_constant<int, 2>());
      if (vectors == 1) multiply(std::integral_constant<int, 1>());
    }
  }
}

/// Each 128-bit block of v to a place of its own, `stride` floats apart.
template <class D>
HWY_INLINE void store_blocks(D d, hn::Vec<D> v, float* to, int64_t stride) {
  if constexpr (hn::MaxLanes(d) > 4) {
    const hn::Half<D> half;
    store_blocks(half, hn::LowerHalf(half, v), to, stride);
    store_blocks(half, hn::UpperHalf(half, v), to + hn::MaxLanes(half) / 4 * stride, stride);
  } else {
    hn::Store(v, d, to);
  }
}

/// to [columns, rows] = from [rows, columns]^T; rows is a multiple of 4, columns of kTileAlign.
inline void transpose(int64_t rows, int64_t columns, const Tile& from, const Tile& to) {
  const F32 d;
  const hn::Repartition<double, F32> pairs;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  for (int64_t j = 0; j < columns; j += lanes) {
    for (int64_t i = 0; i < rows; i += 4) {
      // Four rows: block b of vector c becomes column j + 4 b + c.
      const auto r0 = hn::Load(d, from.row(i) + j), r1 = hn::Load(d, from.row(i + 1) + j);
      const auto r2 = hn::Load(d, from.row(i + 2) + j), r3 = hn::Load(d, from.row(i + 3) + j);
      const auto low01 = hn::BitCast(pairs, hn::InterleaveLower(d, r0, r1));
      const auto low23 = hn::BitCast(pairs, hn::InterleaveLower(d, r2, r3));
      const auto high01 = hn::BitCast(pairs, hn::InterleaveUpper(d, r0, r1));
      const auto high23 = hn::BitCast(pairs, hn::InterleaveUpper(d, r2, r3));
      float* column = to.row(j) + i;
      const auto store = [&](hn::Vec<decltype(pairs)> v, int64_t c) HWY_ATTR {
        store_blocks(d, hn::BitCast(d, v), column + c * to.stride, 4 * to.stride);
      };
      store(hn::InterleaveLower(pairs, low01, low23), 0);
      store(hn::InterleaveUpper(pairs, low01, low23), 1);
      store(hn::InterleaveLower(pairs, high01, high23), 2);
      store(hn::InterleaveUpper(pairs, high01, high23), 3);
    }
  }
}

}  // namespace gdn::kernels::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // include guard
