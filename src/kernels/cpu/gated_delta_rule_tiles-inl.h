// What the gated delta rule kernels share: loading tokens and states into tiles, the gates of a
// chunk, the masked decay matrix and the two triangular solves. One chunk of one value head
// stays in the L2 cache; everything is fp32; rows and columns beyond the real ones are zero, which
// the equations keep zero, so no product needs a remainder.
//
// Included once per instruction set (Highway's foreach_target), hence the unusual guard.

#if defined(GDN_KERNELS_CPU_GATED_DELTA_RULE_TILES_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef GDN_KERNELS_CPU_GATED_DELTA_RULE_TILES_INL_H_
#undef GDN_KERNELS_CPU_GATED_DELTA_RULE_TILES_INL_H_
#else
#define GDN_KERNELS_CPU_GATED_DELTA_RULE_TILES_INL_H_
#endif

#include <cmath>
#include <cstring>
#include <type_traits>

#include <hwy/aligned_allocator.h>
#include <hwy/contrib/math/math-inl.h>

#include <gdn/kernels/cpu/column_slices.h>
#include <gdn/kernels/cpu/element_type.h>
#include <gdn/kernels/cpu/matmul-inl.h>
#include <gdn/kernels/cpu/simd-inl.h>
#include <gdn/kernels/gated_delta_rule.h>

HWY_BEFORE_NAMESPACE();
namespace gdn::kernels::cpu::HWY_NAMESPACE {

inline constexpr int64_t kMaxChunk = 128;
inline constexpr float kL2NormEps = 1e-6F;

/// Hands out tiles of one zeroed, aligned allocation.
class Workspace {
 public:
  explicit Workspace(int64_t floats, ParallelFor parallel_for = serial_for)
      : memory_(hwy::AllocateAligned<float>(static_cast<size_t>(floats))), next_(memory_.get()) {
    constexpr int64_t kPiece = 1 << 18;  // enough to be worth another thread
    parallel_for((floats + kPiece - 1) / kPiece, [&](int64_t begin, int64_t end) {
      const int64_t count = std::min(end * kPiece, floats) - begin * kPiece;
      std::memset(memory_.get() + begin * kPiece, 0, static_cast<size_t>(count) * sizeof(float));
    });
  }
  static int64_t tile_floats(int64_t rows, int64_t columns) {
    return padded(rows) * tile_stride(columns);
  }
  Tile tile(int64_t rows, int64_t columns) {
    const Tile tile = {next_, tile_stride(columns)};
    next_ += tile_floats(rows, columns);
    return tile;
  }

 private:
  hwy::AlignedFreeUniquePtr<float[]> memory_;
  float* next_;
};

/// What follows the first rows of a tile.
inline Tile below(const Tile& tile, int64_t rows) { return {tile.row(rows), tile.stride}; }

/// Sequence n of the problem: where its tokens are.
struct Sequence {
  int64_t b, first_token, tokens;
};
inline Sequence sequence(const GatedDeltaRuleProblem& p, int64_t n) {
  if (p.cu_seqlens == nullptr) return {n, 0, p.T};
  return {0, p.cu_seqlens[n], p.cu_seqlens[n + 1] - p.cu_seqlens[n]};
}

/// Tokens [t, t + tokens) of row b, head h, into the rows of `tile`; rows up to `rows` and columns
/// up to padded(columns) become zero.
inline void load_tokens(const ConstView4& view, DType dtype, int64_t b, int64_t t, int64_t h,
                        int64_t tokens, int64_t rows, int64_t columns, const Tile& tile) {
  const F32 d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d)), whole = columns / lanes * lanes;
  with_element_type(dtype, [&](auto* type) {
    using Element = std::remove_pointer_t<decltype(type)>;
    const Element* from = static_cast<const Element*>(view.data) + b * view.stride_b +
                          t * view.stride_t + h * view.stride_h;
    for (int64_t i = 0; i < tokens; ++i, from += view.stride_t) {
      float* to = tile.row(i);
      for (int64_t j = 0; j < whole; j += lanes) hn::Store(LoadF32(d, from + j), d, to + j);
      for (int64_t j = whole; j < padded(columns); j += lanes) {
        hn::Store(LoadF32(d, from + j, std::max<int64_t>(columns - j, 0)), d, to + j);
      }
    }
  });
  for (int64_t i = tokens; i < rows; ++i) {
    std::memset(tile.row(i), 0, static_cast<size_t>(padded(columns)) * sizeof(float));
  }
}

/// Adds what load_tokens or store_tokens will touch, if anything.
template <typename View>
void add_tokens(Ahead& ahead, const View& view, DType dtype, int64_t b, int64_t t, int64_t h,
                int64_t tokens, int64_t columns) {
  if (view.data == nullptr || tokens <= 0) return;
  with_element_type(dtype, [&](auto* type) {
    using Element = std::remove_pointer_t<decltype(type)>;
    constexpr auto kSize = static_cast<int64_t>(sizeof(Element));
    ahead.add(static_cast<const Element*>(view.data) + b * view.stride_b + t * view.stride_t +
                  h * view.stride_h,
              tokens, view.stride_t * kSize, columns * kSize);
  });
}

/// The inverse of load_tokens.
inline void store_tokens(const MutableView4& view, DType dtype, int64_t b, int64_t t, int64_t h,
                         int64_t tokens, int64_t columns, const Tile& tile) {
  const F32 d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d)), whole = columns / lanes * lanes;
  with_element_type(dtype, [&](auto* type) {
    using Element = std::remove_pointer_t<decltype(type)>;
    Element* to = static_cast<Element*>(view.data) + b * view.stride_b + t * view.stride_t +
                  h * view.stride_h;
    for (int64_t i = 0; i < tokens; ++i, to += view.stride_t) {
      const float* from = tile.row(i);
      for (int64_t j = 0; j < whole; j += lanes) StoreF32(d, hn::Load(d, from + j), to + j);
      if (whole < columns) StoreF32(d, hn::Load(d, from + whole), to + whole, columns - whole);
    }
  });
}

/// Sum over j of x_j y_j; n is a multiple of kTileAlign.
HWY_INLINE float dot(const float* HWY_RESTRICT x, const float* HWY_RESTRICT y, int64_t n) {
  const F32 d;
  auto sum = hn::Zero(d);
  for (int64_t j = 0; j < n; j += static_cast<int64_t>(hn::Lanes(d))) {
    sum = hn::MulAdd(hn::Load(d, x + j), hn::Load(d, y + j), sum);
  }
  return hn::GetLane(hn::SumOfLanes(d, sum));
}

/// to = factor * from + keep * to, over n columns (a multiple of kTileAlign). keep = 0 reads
/// nothing.
HWY_INLINE void scale_row(float factor, const float* from, float keep, float* to, int64_t n) {
  const F32 d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  const auto f = hn::Set(d, factor), r = hn::Set(d, keep);
  if (keep == 0.0F) {
    for (int64_t j = 0; j < n; j += lanes) hn::Store(hn::Mul(f, hn::Load(d, from + j)), d, to + j);
  } else {
    for (int64_t j = 0; j < n; j += lanes) {
      hn::Store(hn::MulAdd(f, hn::Load(d, from + j), hn::Mul(r, hn::Load(d, to + j))), d, to + j);
    }
  }
}

/// Rows of x become x * rsqrt(sum(x^2) + eps); the factors go to `rstd`.
inline void l2_normalize(const Tile& x, int64_t rows, int64_t columns, float* rstd) {
  for (int64_t i = 0; i < rows; ++i) {
    rstd[i] = 1.0F / std::sqrt(dot(x.row(i), x.row(i), padded(columns)) + kL2NormEps);
    scale_row(rstd[i], x.row(i), 0.0F, x.row(i), padded(columns));
  }
}

/// Columns of a state [K, V], or [V, K] when v_first, from memory to a tile [K, columns.count];
/// null: zeros.
inline void load_state(const float* from, int64_t K, int64_t V, bool v_first,
                       const Columns& columns, const Tile& state) {
  const auto bytes = static_cast<size_t>(columns.count) * sizeof(float);
  for (int64_t i = 0; i < K; ++i) {
    if (from == nullptr) {
      std::memset(state.row(i), 0, bytes);
    } else if (v_first) {
      for (int64_t j = 0; j < columns.count; ++j) {
        state.row(i)[j] = from[(columns.first + j) * K + i];
      }
    } else {
      std::memcpy(state.row(i), from + i * V + columns.first, bytes);
    }
  }
}

inline void store_state(const Tile& state, int64_t K, int64_t V, bool v_first,
                        const Columns& columns, float* to) {
  for (int64_t i = 0; i < K; ++i) {
    if (v_first) {
      for (int64_t j = 0; j < columns.count; ++j) {
        to[(columns.first + j) * K + i] = state.row(i)[j];
      }
    } else {
      std::memcpy(to + i * V + columns.first, state.row(i),
                  static_cast<size_t>(columns.count) * sizeof(float));
    }
  }
}

static_assert(kSliceAlign % kTileAlign == 0);

/// Values, or their gradients, from column `first` on.
template <typename View>
View columns_from(View view, DType dtype, int64_t first) {
  if (view.data == nullptr) return view;
  with_element_type(dtype, [&](auto* type) {
    using Element = std::remove_pointer_t<decltype(type)>;
    using Data = std::conditional_t<std::is_same_v<View, ConstView4>, const Element, Element>;
    view.data = static_cast<Data*>(view.data) + first;
  });
  return view;
}

/// Gates of one chunk. b_i = sum of g up to and with token i, kept as a sum of two floats: the
/// difference of two large sums then loses nothing.
struct ChunkGates {
  HWY_ALIGN float b_high[kMaxChunk], b_low[kMaxChunk];
  HWY_ALIGN float beta[kMaxChunk];
  HWY_ALIGN float from_start[kMaxChunk];        // exp(b_i)
  HWY_ALIGN float minus_from_start[kMaxChunk];  // -exp(b_i)
  HWY_ALIGN float read[kMaxChunk];              // scale exp(b_i)
  HWY_ALIGN float to_end[kMaxChunk];            // exp(b_C - b_i)
  float whole;                                  // exp(b_C)
};

/// exp(high + low), |low| tiny: rounding a large |x| to fp32 first would cost |x| 2^-24 of exp(x).
template <class D>
HWY_INLINE hn::Vec<D> exp_of_sum(D d, hn::Vec<D> high, hn::Vec<D> low) {
  const auto e = SafeExp(d, high);
  return hn::MulAdd(e, low, e);
}

/// g, beta: the chunk's first token and head; stride: floats between tokens. Padding rows [tokens,
/// rows) get g = 0 and beta = 0.
inline void load_gates(const float* g, const float* beta, int64_t stride, int64_t tokens,
                       int64_t rows, float scale, ChunkGates& gates) {
  // exp of anything below is 0 in fp32: nothing is lost, and -inf cannot make a NaN.
  constexpr float kLowestGate = -200.0F;
  const F32 d;
  double b[kMaxChunk];
  double sum = 0.0;
  for (int64_t i = 0; i < rows; ++i) {
    const float gate = i < tokens ? g[i * stride] : 0.0F;
    sum += gate < kLowestGate ? kLowestGate : gate;
    b[i] = sum;
    gates.beta[i] = i < tokens ? beta[i * stride] : 0.0F;
  }
  HWY_ALIGN float rest_high[kMaxChunk], rest_low[kMaxChunk];  // b_C - b_i
  for (int64_t i = 0; i < rows; ++i) {
    const double rest = sum - b[i];
    gates.b_high[i] = static_cast<float>(b[i]);
    gates.b_low[i] = static_cast<float>(b[i] - gates.b_high[i]);
    rest_high[i] = static_cast<float>(rest);
    rest_low[i] = static_cast<float>(rest - rest_high[i]);
  }
  for (int64_t i = 0; i < rows; i += static_cast<int64_t>(hn::Lanes(d))) {
    const auto from_start =
        exp_of_sum(d, hn::Load(d, gates.b_high + i), hn::Load(d, gates.b_low + i));
    hn::Store(from_start, d, gates.from_start + i);
    hn::Store(hn::Neg(from_start), d, gates.minus_from_start + i);
    hn::Store(hn::Mul(hn::Set(d, scale), from_start), d, gates.read + i);
    hn::Store(exp_of_sum(d, hn::Load(d, rest_high + i), hn::Load(d, rest_low + i)), d,
              gates.to_end + i);
  }
  gates.whole = gates.from_start[rows - 1];
}

/// G = strict_lower(K K^T) o D and P = scale lower(Q K^T) o D with D_ij = exp(b_i - b_j), from the
/// lower triangles of the scores. P and D are left out where they have no memory; zeros above the
/// diagonal. rows is a multiple of kTileAlign.
inline void decay_scores(const ChunkGates& gates, int64_t rows, float scale, const Tile& kk,
                         const Tile& qk, const Tile& G, const Tile& P, const Tile& D) {
  const F32 d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  const auto factor = hn::Set(d, scale);
  for (int64_t i = 0; i < rows; ++i) {
    const auto high = hn::Set(d, gates.b_high[i]), low = hn::Set(d, gates.b_low[i]);
    for (int64_t j = 0; j < rows; j += lanes) {
      auto decay = hn::Zero(d), g = hn::Zero(d), p = hn::Zero(d);
      if (j <= i) {
        const auto difference = hn::Add(hn::Sub(high, hn::Load(d, gates.b_high + j)),
                                        hn::Sub(low, hn::Load(d, gates.b_low + j)));
        const auto kept = hn::FirstN(d, static_cast<size_t>(std::min(lanes, i + 1 - j)));
        const auto below = hn::FirstN(d, static_cast<size_t>(std::min(lanes, i - j)));
        decay = hn::IfThenElseZero(kept, SafeExp(d, difference));
        // Above the diagonal the scores may be undefined: masked, never multiplied by zero.
        g = hn::IfThenElseZero(below, hn::Mul(decay, hn::Load(d, kk.row(i) + j)));
        if (P.data != nullptr) {
          const auto score = hn::IfThenElseZero(kept, hn::Load(d, qk.row(i) + j));
          p = hn::Mul(hn::Mul(factor, decay), score);
        }
      }
      hn::Store(g, d, G.row(i) + j);
      if (P.data != nullptr) hn::Store(p, d, P.row(i) + j);
      if (D.data != nullptr) hn::Store(decay, d, D.row(i) + j);
    }
  }
}

/// Rows [block, block + kMicroRows) of the forward solve, kVectors vectors of columns from
/// `column`.
template <int kVectors>
HWY_INLINE void solve_rows_forward(const Tile& G, const float* beta, int64_t block, int64_t column,
                                   const Tile& r, const Tile& u) {
  const F32 d;
  using Vec = hn::Vec<F32>;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  Vec sum[kMicroRows][kVectors];
  for (auto& row : sum) {
    for (Vec& x : row) x = hn::Zero(d);
  }
  accumulate<kMicroRows, kVectors>(0, block, plain({G.row(block), G.stride}), u, column, sum);
  for (int i = 0; i < kMicroRows; ++i) {
    const float* g = G.row(block + i) + block;
    for (int l = 0; l < kVectors; ++l) {
      // sum[j], j < i, holds U_j by now.
      float* at = r.row(block + i) + column + l * lanes;
      Vec x = hn::Sub(hn::Load(d, at), sum[i][l]);
      for (int j = 0; j < i; ++j) x = hn::NegMulAdd(hn::Set(d, g[j]), sum[j][l], x);
      hn::Store(x, d, at);
      sum[i][l] = hn::Mul(hn::Set(d, beta[block + i]), x);
      hn::Store(sum[i][l], d, u.row(block + i) + column + l * lanes);
    }
  }
}

/// Solves U^_i = R_i - sum_{j<i} G_ij U_j with U = diag(beta) U^. `r` holds R and becomes U^.
/// G [rows, rows] strictly lower; n columns, a multiple of kTileAlign.
inline HWY_NOINLINE void solve_forward(const Tile& G, const float* beta, int64_t rows, int64_t n,
                                       const Tile& r, const Tile& u) {
  const int64_t panel = 2 * static_cast<int64_t>(hn::Lanes(F32()));
  for (int64_t column = 0; column < n; column += panel) {
    for (int64_t block = 0; block < rows; block += kMicroRows) {
      if (column + panel <= n) {
        solve_rows_forward<2>(G, beta, block, column, r, u);
      } else {
        solve_rows_forward<1>(G, beta, block, column, r, u);
      }
    }
  }
}

/// Rows [block, block + kMicroRows) of the backward solve, kVectors vectors of columns.
template <int kVectors>
HWY_INLINE void solve_rows_backward(const Tile& G, const float* beta, int64_t block, int64_t rows,
                                    int64_t column, const Tile& x, const Tile& y) {
  const F32 d;
  using Vec = hn::Vec<F32>;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  const int64_t after = block + kMicroRows;
  Vec sum[kMicroRows][kVectors];
  for (auto& row : sum) {
    for (Vec& z : row) z = hn::Zero(d);
  }
  accumulate<kMicroRows, kVectors>(after, rows, transposed({G.data + block, G.stride}), y, column,
                                   sum);
  for (int j = kMicroRows - 1; j >= 0; --j) {
    for (int l = 0; l < kVectors; ++l) {
      // sum[i], i > j, holds Y_i by now.
      float* at = x.row(block + j) + column + l * lanes;
      Vec z = hn::Sub(hn::Load(d, at), sum[j][l]);
      for (int i = kMicroRows - 1; i > j; --i) {
        z = hn::NegMulAdd(hn::Set(d, G.row(block + i)[block + j]), sum[i][l], z);
      }
      hn::Store(z, d, at);
      sum[j][l] = hn::Mul(hn::Set(d, beta[block + j]), z);
      hn::Store(sum[j][l], d, y.row(block + j) + column + l * lanes);
    }
  }
}

/// The transposed solve: Z_j = X_j - sum_{i>j} G_ij Y_i with Y = diag(beta) Z. `x` holds X and
/// becomes Z.
inline HWY_NOINLINE void solve_backward(const Tile& G, const float* beta, int64_t rows, int64_t n,
                                        const Tile& x, const Tile& y) {
  const int64_t panel = 2 * static_cast<int64_t>(hn::Lanes(F32()));
  for (int64_t column = 0; column < n; column += panel) {
    for (int64_t block = rows - kMicroRows; block >= 0; block -= kMicroRows) {
      if (column + panel <= n) {
        solve_rows_backward<2>(G, beta, block, rows, column, x, y);
      } else {
        solve_rows_backward<1>(G, beta, block, rows, column, x, y);
      }
    }
  }
}

/// Tiles of one chunk that its state recurrence needs, beside k and v.
struct StateTiles {
  Tile u;  // [C, V]
  Tile G;  // [C, C], strict_lower(K K^T) o D
  static int64_t floats(int64_t C, int64_t V) {
    return Workspace::tile_floats(C, V) + Workspace::tile_floats(C, C);
  }
  StateTiles(Workspace& w, int64_t C, int64_t V) : u(w.tile(C, V)), G(w.tile(C, C)) {}
};

/// The lower triangles of K K^T and Q K^T, which all value heads of a key head share. kT [K, C] is
/// scratch. Without memory for q there is no Q K^T.
inline void score_products(Ahead& ahead, const Tile& k, const Tile& q, int64_t rows, int64_t K,
                           const Tile& kT, const Tile& kk, const Tile& qk) {
  transpose(rows, padded(K), k, kT);
  matmul<Into::set, Skip::c_above_diagonal>(ahead, rows, rows, K, plain(k), kT, kk);
  if (q.data == nullptr) return;
  matmul<Into::set, Skip::c_above_diagonal>(ahead, rows, rows, K, plain(q), kT, qk);
}

/// v holds V and becomes U^ = U / beta; t.u becomes U. S is the state at the chunk's start.
inline void solve_chunk(Ahead& ahead, const Tile& k, const Tile& v, const StateTiles& t,
                        const ChunkGates& gates, const Tile& S, int64_t rows, int64_t K,
                        int64_t V) {
  matmul<Into::add>(ahead, rows, padded(V), K, plain(k), S, v, {gates.minus_from_start});
  solve_forward(t.G, gates.beta, rows, padded(V), v, t.u);
}

/// S' = exp(b_C) S + K^T diag(exp(b_C - b)) U; S' may be S. t.u becomes the decayed U.
inline void update_state(Ahead& ahead, const Tile& k, const StateTiles& t, const ChunkGates& gates,
                         const Tile& S, const Tile& next_S, int64_t rows, int64_t K, int64_t V) {
  for (int64_t i = 0; i < rows; ++i) {
    scale_row(gates.to_end[i], t.u.row(i), 0.0F, t.u.row(i), padded(V));
  }
  matmul<Into::add>(ahead, padded(K), padded(V), rows, transposed(k), t.u, next_S,
                    {.keep = gates.whole, .old = S});
}

/// Value heads of one key head that one task takes through the sequence together: they share the
/// key head's scores. As many as leave every thread some tasks to balance with, and as many states
/// as half of a common L2 cache holds.
inline int64_t heads_per_task(const GatedDeltaRuleProblem& p) {
  constexpr int64_t kTasksPerThread = 4;
  constexpr int64_t kStateBytes = 512 << 10;
  const int64_t group = p.HV / p.H, state = p.K * p.V * static_cast<int64_t>(sizeof(float));
  for (int64_t heads = group; heads > 1; --heads) {
    if (group % heads == 0 && heads * state <= kStateBytes &&
        p.N * p.HV / heads >= kTasksPerThread * p.threads) {
      return heads;
    }
  }
  return 1;
}

}  // namespace gdn::kernels::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // include guard
