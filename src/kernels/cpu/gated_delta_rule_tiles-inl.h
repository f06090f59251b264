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
  explicit Workspace(int64_t floats)
      : memory_(hwy::AllocateAligned<float>(static_cast<size_t>(floats))), next_(memory_.get()) {
    std::memset(memory_.get(), 0, static_cast<size_t>(floats) * sizeof(float));
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

/// Sequence n of the problem: where its tokens are.
struct Sequence {
  int64_t b, first_token, tokens;
};
inline Sequence sequence(const GatedDeltaRuleProblem& p, int64_t n) {
  if (p.cu_seqlens == nullptr) return {n, 0, p.T};
  return {0, p.cu_seqlens[n], p.cu_seqlens[n + 1] - p.cu_seqlens[n]};
}

/// Tokens [t, t + tokens) of row b, head h, into the rows of `tile`; rows up to `rows` become zero.
inline void load_tokens(const ConstView4& view, DType dtype, int64_t b, int64_t t, int64_t h,
                        int64_t tokens, int64_t rows, int64_t columns, const Tile& tile) {
  const F32 d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  with_element_type(dtype, [&](auto* type) {
    using Element = std::remove_pointer_t<decltype(type)>;
    const Element* from = static_cast<const Element*>(view.data) + b * view.stride_b +
                          t * view.stride_t + h * view.stride_h;
    for (int64_t i = 0; i < tokens; ++i, from += view.stride_t) {
      for (int64_t j = 0; j < columns; j += lanes) {
        hn::Store(LoadF32(d, from + j, std::min(lanes, columns - j)), d, tile.row(i) + j);
      }
    }
  });
  for (int64_t i = tokens; i < rows; ++i) {
    std::memset(tile.row(i), 0, static_cast<size_t>(padded(columns)) * sizeof(float));
  }
}

/// The inverse of load_tokens, times `factor`.
inline void store_tokens(const MutableView4& view, DType dtype, int64_t b, int64_t t, int64_t h,
                         int64_t tokens, int64_t columns, const Tile& tile, float factor = 1.0F) {
  const F32 d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  with_element_type(dtype, [&](auto* type) {
    using Element = std::remove_pointer_t<decltype(type)>;
    Element* to = static_cast<Element*>(view.data) + b * view.stride_b + t * view.stride_t +
                  h * view.stride_h;
    for (int64_t i = 0; i < tokens; ++i, to += view.stride_t) {
      for (int64_t j = 0; j < columns; j += lanes) {
        StoreF32(d, hn::Mul(hn::Set(d, factor), hn::Load(d, tile.row(i) + j)), to + j,
                 std::min(lanes, columns - j));
      }
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

/// State [K, V], or [V, K] when v_first, from memory to a tile [K, V]; null: zeros.
inline void load_state(const float* from, int64_t K, int64_t V, bool v_first, const Tile& state) {
  for (int64_t i = 0; i < K; ++i) {
    if (from == nullptr) {
      std::memset(state.row(i), 0, static_cast<size_t>(V) * sizeof(float));
    } else if (v_first) {
      for (int64_t j = 0; j < V; ++j) state.row(i)[j] = from[j * K + i];
    } else {
      std::memcpy(state.row(i), from + i * V, static_cast<size_t>(V) * sizeof(float));
    }
  }
}

inline void store_state(const Tile& state, int64_t K, int64_t V, bool v_first, float* to) {
  for (int64_t i = 0; i < K; ++i) {
    if (v_first) {
      for (int64_t j = 0; j < V; ++j) to[j * K + i] = state.row(i)[j];
    } else {
      std::memcpy(to + i * V, state.row(i), static_cast<size_t>(V) * sizeof(float));
    }
  }
}

/// Gates of one chunk. b_i = sum of g up to and with token i, kept as a sum of two floats: the
/// difference of two large sums then loses nothing.
struct ChunkGates {
  HWY_ALIGN float b_high[kMaxChunk], b_low[kMaxChunk];
  HWY_ALIGN float beta[kMaxChunk];
  HWY_ALIGN float from_start[kMaxChunk];  // exp(b_i)
  HWY_ALIGN float to_end[kMaxChunk];      // exp(b_C - b_i)
  float whole;                            // exp(b_C)
};

/// exp(x) to fp32 accuracy: rounding a large |x| to fp32 first would cost |x| 2^-24 of the result.
inline float exp_to_float(double x) {
  const auto high = static_cast<float>(x);
  return std::exp(high) * (1.0F + static_cast<float>(x - high));
}

/// g, beta: the chunk's first token and head; stride: floats between tokens. Padding rows [tokens,
/// rows) get g = 0 and beta = 0.
inline void load_gates(const float* g, const float* beta, int64_t stride, int64_t tokens,
                       int64_t rows, ChunkGates& gates) {
  // exp of anything below is 0 in fp32: nothing is lost, and -inf cannot make a NaN.
  constexpr float kLowestGate = -200.0F;
  double b[kMaxChunk];
  double sum = 0.0;
  for (int64_t i = 0; i < rows; ++i) {
    const float gate = i < tokens ? g[i * stride] : 0.0F;
    sum += gate < kLowestGate ? kLowestGate : gate;
    b[i] = sum;
    gates.b_high[i] = static_cast<float>(sum);
    gates.b_low[i] = static_cast<float>(sum - gates.b_high[i]);
    gates.beta[i] = i < tokens ? beta[i * stride] : 0.0F;
  }
  for (int64_t i = 0; i < rows; ++i) {
    gates.from_start[i] = exp_to_float(b[i]);
    gates.to_end[i] = exp_to_float(sum - b[i]);
  }
  gates.whole = exp_to_float(sum);
}

/// D_ij = exp(b_i - b_j) for j <= i, else 0. rows is a multiple of kTileAlign.
inline void decay_matrix(const ChunkGates& gates, int64_t rows, const Tile& decay) {
  const F32 d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  for (int64_t i = 0; i < rows; ++i) {
    const auto high = hn::Set(d, gates.b_high[i]), low = hn::Set(d, gates.b_low[i]);
    for (int64_t j = 0; j < rows; j += lanes) {
      auto value = hn::Zero(d);
      if (j <= i) {
        const auto difference = hn::Add(hn::Sub(high, hn::Load(d, gates.b_high + j)),
                                        hn::Sub(low, hn::Load(d, gates.b_low + j)));
        const auto kept = hn::FirstN(d, static_cast<size_t>(std::min(lanes, i + 1 - j)));
        value = hn::IfThenElseZero(kept, hn::Exp(d, hn::IfThenElseZero(kept, difference)));
      }
      hn::Store(value, d, decay.row(i) + j);
    }
  }
}

/// m <- factor * m o decay on the lower triangle, 0 above it, and on the diagonal too when strict.
inline void mask_with_decay(const Tile& decay, int64_t rows, float factor, bool strict,
                            const Tile& m) {
  const F32 d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  const auto f = hn::Set(d, factor);
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t kept = strict ? i : i + 1;
    for (int64_t j = 0; j < rows; j += lanes) {
      // Above the diagonal m may be undefined: masked, never multiplied by zero.
      const int64_t here = std::clamp<int64_t>(kept - j, 0, lanes);
      const auto product =
          hn::Mul(hn::Mul(f, hn::Load(d, m.row(i) + j)), hn::Load(d, decay.row(i) + j));
      hn::Store(hn::IfThenElseZero(hn::FirstN(d, static_cast<size_t>(here)), product), d,
                m.row(i) + j);
    }
  }
}

/// Solves U^_i = R_i - sum_{j<i} G_ij U_j with U = diag(beta) U^. `r` holds R and becomes U^.
/// G [rows, rows] strictly lower; n columns, a multiple of kTileAlign.
inline void solve_forward(const Tile& G, const float* beta, int64_t rows, int64_t n, const Tile& r,
                          const Tile& u) {
  for (int64_t block = 0; block < rows; block += kMicroRows) {
    if (block > 0) {
      matmul<Into::subtract>(kMicroRows, n, block, plain({G.row(block), G.stride}), u,
                             {r.row(block), r.stride});
    }
    for (int64_t i = block; i < block + kMicroRows; ++i) {
      for (int64_t j = block; j < i; ++j) scale_row(-G.row(i)[j], u.row(j), 1.0F, r.row(i), n);
      scale_row(beta[i], r.row(i), 0.0F, u.row(i), n);
    }
  }
}

/// The transposed solve: Z_j = X_j - sum_{i>j} G_ij Y_i with Y = diag(beta) Z. `x` holds X and
/// becomes Z.
inline void solve_backward(const Tile& G, const float* beta, int64_t rows, int64_t n, const Tile& x,
                           const Tile& y) {
  for (int64_t block = rows - kMicroRows; block >= 0; block -= kMicroRows) {
    const int64_t after = block + kMicroRows;
    if (after < rows) {
      matmul<Into::subtract>(kMicroRows, n, rows - after,
                             transposed({G.row(after) + block, G.stride}), {y.row(after), y.stride},
                             {x.row(block), x.stride});
    }
    for (int64_t j = after - 1; j >= block; --j) {
      for (int64_t i = j + 1; i < after; ++i) {
        scale_row(-G.row(i)[j], y.row(i), 1.0F, x.row(j), n);
      }
      scale_row(beta[j], x.row(j), 0.0F, y.row(j), n);
    }
  }
}

/// Tiles of one chunk that its state recurrence needs.
struct StateTiles {
  Tile k;      // [C, K]
  Tile kT;     // [K, C]
  Tile v;      // [C, V]
  Tile u;      // [C, V]
  Tile decay;  // [C, C]
  Tile G;      // [C, C], strict_lower(K K^T) o D
  static int64_t floats(int64_t C, int64_t K, int64_t V) {
    return Workspace::tile_floats(C, K) + Workspace::tile_floats(K, C) +
           2 * Workspace::tile_floats(C, V) + 2 * Workspace::tile_floats(C, C);
  }
  StateTiles(Workspace& w, int64_t C, int64_t K, int64_t V)
      : k(w.tile(C, K)),
        kT(w.tile(K, C)),
        v(w.tile(C, V)),
        u(w.tile(C, V)),
        decay(w.tile(C, C)),
        G(w.tile(C, C)) {}
};

/// kT, decay and G from k and the gates.
inline void key_products(const StateTiles& t, const ChunkGates& gates, int64_t rows, int64_t K) {
  transpose(rows, padded(K), t.k, t.kT);
  matmul<Into::set, Skip::c_above_diagonal>(rows, rows, K, plain(t.k), t.kT, t.G);
  decay_matrix(gates, rows, t.decay);
  mask_with_decay(t.decay, rows, 1.0F, /*strict=*/true, t.G);
}

/// t.v holds V and becomes U^ = U / beta; t.u becomes U. S is the state at the chunk's start.
inline void solve_chunk(const StateTiles& t, const ChunkGates& gates, const Tile& S, int64_t rows,
                        int64_t K, int64_t V) {
  matmul<Into::set>(rows, padded(V), K, plain(t.k), S, t.u);
  for (int64_t i = 0; i < rows; ++i) {
    scale_row(-gates.from_start[i], t.u.row(i), 1.0F, t.v.row(i), padded(V));
  }
  solve_forward(t.G, gates.beta, rows, padded(V), t.v, t.u);
}

/// S <- exp(b_C) S + K^T diag(exp(b_C - b)) U. t.u becomes the decayed U.
inline void update_state(const StateTiles& t, const ChunkGates& gates, const Tile& S, int64_t rows,
                         int64_t K, int64_t V) {
  for (int64_t i = 0; i < rows; ++i) {
    scale_row(gates.to_end[i], t.u.row(i), 0.0F, t.u.row(i), padded(V));
  }
  matmul<Into::add>(padded(K), padded(V), rows, transposed(t.k), t.u, S, gates.whole);
}

}  // namespace gdn::kernels::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // include guard
