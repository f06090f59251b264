// Products of fp32 tiles on the vector units, or on Intel's matrix unit where the machine has one.
//
// The matrix unit (AMX) multiplies bf16 and adds in fp32. A factor is cut into pieces of bf16, each
// with the next 8 bits of every number: three hold all of fp32, and one holds a number that was bf16.
// A product adds up the products of pieces, the smallest first, and leaves out those below fp32's
// last bit. Its error is that of a product in fp32.
//
// Included once per instruction set (Highway's foreach_target), hence the unusual guard.

#if defined(GDN_KERNELS_CPU_PRODUCT_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef GDN_KERNELS_CPU_PRODUCT_INL_H_
#undef GDN_KERNELS_CPU_PRODUCT_INL_H_
#else
#define GDN_KERNELS_CPU_PRODUCT_INL_H_
#endif

#include <cstdint>

#include <gdn/kernels/cpu/matmul-inl.h>
#include <gdn/kernels/cpu/matrix_unit.h>

#undef GDN_MATRIX_UNIT
#if HWY_ARCH_X86_64 && HWY_TARGET <= HWY_AVX3
#define GDN_MATRIX_UNIT 1
#else
#define GDN_MATRIX_UNIT 0
#endif

HWY_BEFORE_NAMESPACE();
namespace gdn::kernels::cpu::HWY_NAMESPACE {

/// Pieces that hold any fp32 number.
inline constexpr int kAllPieces = 3;

/// A factor as the matrix unit reads it: for each piece tiles of 16 x 32 bf16, 1 KB each. A left
/// factor's tile holds 16 rows of 32; a right factor's 32 rows of 16, two rows interleaved.
struct Packed {
  static constexpr int64_t kRows = 16, kDepth = 32;
  static constexpr int64_t kTile = kRows * kDepth;  // elements
  uint16_t* data = nullptr;                         // null: the vector units multiply
  int pieces = 0;
  int64_t piece_stride = 0;  // elements
  int64_t depth = 0;         // tiles of the inner dimension, set by packing

  uint16_t* tile(int piece, int64_t outer, int64_t inner) const {
    return data + piece * piece_stride + (outer * depth + inner) * kTile;
  }
  static int64_t tiles(int64_t outer, int64_t inner) {
    return (outer + kRows - 1) / kRows * ((inner + kDepth - 1) / kDepth);
  }
};

/// A left factor: where the vector units read it, and the packed form.
struct Left {
  LeftFactor plain;
  Packed packed;
};

/// A right factor likewise.
struct Right {
  Tile tile;
  Packed packed;
};

#if GDN_MATRIX_UNIT

/// Calls emit(piece, x, y) with the pieces of two vectors, in the upper 16 bits of every lane; the
/// lower ones are undefined.
template <class Emit>
HWY_INLINE void cut(int pieces, hn::Vec<F32> x, hn::Vec<F32> y, const Emit& emit) {
  const F32 d;
  const auto upper = hn::BitCast(d, hn::Set(hn::RebindToUnsigned<F32>(), 0xFFFF0000U));
  for (int piece = 0; piece < pieces; ++piece) {
    emit(piece, x, y);
    x = hn::Sub(x, hn::And(x, upper));
    y = hn::Sub(y, hn::And(y, upper));
  }
}

inline HWY_NOINLINE void pack_left(const Tile& from, int64_t rows, int64_t depth, Packed& to) {
  const F32 d;
  const hn::Repartition<uint16_t, F32> halves;
  to.depth = (depth + Packed::kDepth - 1) / Packed::kDepth;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < depth; j += Packed::kDepth) {
      const auto x = hn::Load(d, from.row(i) + j);
      const auto y = j + 16 < depth ? hn::Load(d, from.row(i) + j + 16) : hn::Zero(d);
      cut(to.pieces, x, y, [&](int piece, hn::Vec<F32> low, hn::Vec<F32> high) HWY_ATTR {
        hn::Store(hn::ConcatOdd(halves, hn::BitCast(halves, high), hn::BitCast(halves, low)),
                  halves,
                  to.tile(piece, i / Packed::kRows, j / Packed::kDepth) +
                      i % Packed::kRows * Packed::kDepth);
      });
    }
  }
}

inline HWY_NOINLINE void pack_right(const Tile& from, int64_t depth, int64_t columns, Packed& to) {
  const F32 d;
  const hn::RebindToUnsigned<F32> words;
  const auto upper = hn::Set(words, 0xFFFF0000U);
  to.depth = (depth + Packed::kDepth - 1) / Packed::kDepth;
  for (int64_t i = 0; i < to.depth * Packed::kDepth; i += 2) {
    for (int64_t j = 0; j < columns; j += Packed::kRows) {
      const auto x = i < depth ? hn::Load(d, from.row(i) + j) : hn::Zero(d);
      const auto y = i < depth ? hn::Load(d, from.row(i + 1) + j) : hn::Zero(d);
      cut(to.pieces, x, y, [&](int piece, hn::Vec<F32> even, hn::Vec<F32> odd) HWY_ATTR {
        const auto pair = hn::Or(hn::ShiftRight<16>(hn::BitCast(words, even)),
                                 hn::And(hn::BitCast(words, odd), upper));
        uint16_t* tile = to.tile(piece, j / Packed::kRows, i / Packed::kDepth);
        hn::Store(hn::BitCast(hn::Repartition<uint16_t, F32>(), pair),
                  hn::Repartition<uint16_t, F32>(), tile + i % Packed::kDepth * Packed::kRows);
      });
    }
  }
}

/// A 2 x 2 block of C in tiles 0 to 3: adds the products of two row tiles of A and two column tiles
/// of B over `depth` tiles. Compilers know no tile registers unless told to compile for AMX alone,
/// hence the assembly.
template <bool kTwoRows, bool kTwoColumns>
HWY_INLINE void multiply_tiles(const uint16_t* a0, const uint16_t* a1, const uint16_t* b0,
                               const uint16_t* b1, int64_t depth) {
  constexpr int64_t kRowBytes = 64;
  for (int64_t k = 0; k < depth; ++k) {
    asm volatile("tileloadd (%0,%1,1), %%tmm4" ::"r"(a0), "r"(kRowBytes) : "memory");
    asm volatile("tileloadd (%0,%1,1), %%tmm6" ::"r"(b0), "r"(kRowBytes) : "memory");
    asm volatile("tdpbf16ps %%tmm6, %%tmm4, %%tmm0" ::);
    if constexpr (kTwoColumns) {
      asm volatile("tileloadd (%0,%1,1), %%tmm7" ::"r"(b1), "r"(kRowBytes) : "memory");
      asm volatile("tdpbf16ps %%tmm7, %%tmm4, %%tmm1" ::);
    }
    if constexpr (kTwoRows) {
      asm volatile("tileloadd (%0,%1,1), %%tmm5" ::"r"(a1), "r"(kRowBytes) : "memory");
      asm volatile("tdpbf16ps %%tmm6, %%tmm5, %%tmm2" ::);
      if constexpr (kTwoColumns) asm volatile("tdpbf16ps %%tmm7, %%tmm5, %%tmm3" ::);
    }
    a0 += Packed::kTile;
    a1 += Packed::kTile;
    b0 += Packed::kTile;
    b1 += Packed::kTile;
  }
}

/// All products of pieces for one block of C, into `block` [32, 32].
template <bool kTwoRows, bool kTwoColumns>
HWY_INLINE void multiply_block(const Packed& a, const Packed& b, int terms, int64_t row_tile,
                               int64_t column_tile, int64_t begin, int64_t end, float* block) {
  constexpr int64_t kRowBytes = 2 * Packed::kRows * sizeof(float);
  asm volatile("tilezero %%tmm0\n\ttilezero %%tmm1\n\ttilezero %%tmm2\n\ttilezero %%tmm3" ::);
  for (int order = terms - 1; order >= 0; --order) {
    for (int i = std::max(0, order - b.pieces + 1); i <= std::min(order, a.pieces - 1); ++i) {
      const uint16_t* left = a.tile(i, row_tile, begin);
      const uint16_t* right = b.tile(order - i, column_tile, begin);
      multiply_tiles<kTwoRows, kTwoColumns>(left, left + a.depth * Packed::kTile, right,
                                            right + b.depth * Packed::kTile, end - begin);
    }
  }
  asm volatile("tilestored %%tmm0, (%0,%1,1)" ::"r"(block), "r"(kRowBytes) : "memory");
  if constexpr (kTwoColumns) {
    asm volatile("tilestored %%tmm1, (%0,%1,1)" ::"r"(block + 16), "r"(kRowBytes) : "memory");
  }
  if constexpr (kTwoRows) {
    asm volatile("tilestored %%tmm2, (%0,%1,1)" ::"r"(block + 512), "r"(kRowBytes) : "memory");
    if constexpr (kTwoColumns) {
      asm volatile("tilestored %%tmm3, (%0,%1,1)" ::"r"(block + 528), "r"(kRowBytes) : "memory");
    }
  }
}

/// matmul() of packed factors. m and n are multiples of 16.
template <Into kInto, Skip kSkip>
HWY_NOINLINE void multiply_packed(int64_t m, int64_t n, const Packed& a, const Packed& b, int terms,
                                  const Tile& c, const Factors& factors) {
  const F32 d;
  constexpr int64_t kBlock = 2 * Packed::kRows;
  HWY_ALIGN float block[kBlock * kBlock];
  const auto keep = hn::Set(d, factors.keep);
  for (int64_t column = 0; column < n; column += kBlock) {
    const bool two_columns = column + Packed::kRows < n;
    for (int64_t row = 0; row < m; row += kBlock) {
      if (kSkip == Skip::c_above_diagonal && column > row) continue;
      const bool two_rows = row + Packed::kRows < m;
      const int64_t begin = kSkip == Skip::a_below_diagonal ? row / Packed::kDepth : 0;
      const int64_t end =
          kSkip == Skip::a_above_diagonal ? std::min(a.depth, row / Packed::kDepth + 1) : a.depth;
      const auto multiply = [&](auto rows, auto columns) HWY_ATTR {
        multiply_block<rows, columns>(a, b, terms, row / Packed::kRows, column / Packed::kRows,
                                      begin, end, block);
      };
      if (two_rows && two_columns) multiply(std::true_type(), std::true_type());
      if (two_rows && !two_columns) multiply(std::true_type(), std::false_type());
      if (!two_rows && two_columns) multiply(std::false_type(), std::true_type());
      if (!two_rows && !two_columns) multiply(std::false_type(), std::false_type());
      for (int64_t i = 0; i < std::min(kBlock, m - row); ++i) {
        const auto factor =
            hn::Set(d, factors.rows == nullptr ? 1.0F : factors.rows[row + i]);
        for (int64_t j = 0; j < std::min(kBlock, n - column); j += 16) {
          float* out = c.row(row + i) + column + j;
          const auto product = hn::Mul(factor, hn::Load(d, block + i * kBlock + j));
          if constexpr (kInto == Into::set) hn::Store(product, d, out);
          if constexpr (kInto == Into::add) {
            hn::Store(hn::MulAdd(keep, hn::Load(d, out), product), d, out);
          }
        }
      }
    }
  }
}

/// Holds the matrix unit of this thread ready.
class MatrixUnit {
 public:
  explicit MatrixUnit(bool used) : used_(used) {
    struct alignas(64) Configuration {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    };
    static constexpr Configuration kEightFullTiles;
    if (used_) asm volatile("ldtilecfg %0" ::"m"(kEightFullTiles));
  }
  ~MatrixUnit() {
    if (used_) asm volatile("tilerelease" ::);
  }
  MatrixUnit(const MatrixUnit&) = delete;
  MatrixUnit& operator=(const MatrixUnit&) = delete;

 private:
  bool used_;
};

inline bool multiplies_on_matrix_unit() { return uses_matrix_unit(); }

#else

class MatrixUnit {
 public:
  explicit MatrixUnit(bool /*used*/) {}
};
inline bool multiplies_on_matrix_unit() { return false; }

#endif  // GDN_MATRIX_UNIT

/// Brings a left factor [rows, depth] into the form that products read, from a row-major tile.
inline void prepare([[maybe_unused]] Left& left, [[maybe_unused]] const Tile& from,
                    [[maybe_unused]] int64_t rows, [[maybe_unused]] int64_t depth) {
#if GDN_MATRIX_UNIT
  if (left.packed.data != nullptr) pack_left(from, rows, depth, left.packed);
#endif
}

/// A right factor [depth, columns] likewise, from its tile.
inline void prepare([[maybe_unused]] Right& right, [[maybe_unused]] int64_t depth,
                    [[maybe_unused]] int64_t columns) {
#if GDN_MATRIX_UNIT
  if (right.packed.data != nullptr) pack_right(right.tile, depth, columns, right.packed);
#endif
}

/// matmul() on whatever unit the factors are prepared for, with the first `terms` orders of pieces:
/// kAllPieces, or 2 for 16 bits of what goes into a 16-bit output only.
template <Into kInto, Skip kSkip = Skip::none>
HWY_INLINE void multiply(int64_t m, int64_t n, int64_t k, const Left& a, const Right& b,
                         const Tile& c, const Factors& factors = {},
                         [[maybe_unused]] int terms = kAllPieces) {
#if GDN_MATRIX_UNIT
  if (b.packed.data != nullptr) {
    return multiply_packed<kInto, kSkip>(m, n, a.packed, b.packed, terms, c, factors);
  }
#endif
  matmul<kInto, kSkip>(m, n, k, a.plain, b.tile, c, factors);
}

}  // namespace gdn::kernels::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // include guard
