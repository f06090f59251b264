// Chunked backward of the gated delta rule. Given dO and dS', the gradient of the chunk's end
// state, with G, U^, U, D, b as in the forward and P = scale lower(Q K^T) o D:
//
//   dU = P^T dO + diag(exp(b_C - b)) K dS'
//   Z + G^T diag(beta) Z = dU
//   dV = diag(beta) Z
//   dP = scale lower(dO U^T) o D
//   dG = -strict_lower(dV U^T) o D
//   dQ = scale diag(exp b) dO S^T + dP K
//   dK = dG K - diag(exp b) dV S^T                          (k as the reader of the state)
//      + dP^T Q + dG^T K + diag(exp(b_C - b)) U dS'^T       (k as its writer)
//   dbeta_i = Z_i . U^_i
//   dS = exp(b_C) dS' + scale (diag(exp b) Q)^T dO - (diag(exp b) K)^T dV
//
// The gradient of g_t sums over everything that decays across token t: what enters with the state
// and is read at i >= t or leaves, what is written at j < t and is read at i >= t or leaves. With
// X = (dO U^T) o P - (dV U^T) o G, and dQ, dK here without their products within the chunk:
//
//   dg_t = exp(b_C) <dS', S> + sum_{i >= t} (q_i . dQ_i + k_i . (dK as reader)_i)
//        + sum_{j < t} k_j . (dK as writer)_j + sum_{j < t <= i} X_ij
//
// Summed like this nothing cancels, however strong the decay.
//
// The states are replayed a segment at a time from those that the forward kept. Work is spread over
// (sequence, key head): the value heads of a group share the scores, and add up dQ, dK and the
// gradients of the scores in a fixed order. Where these are few, it goes through a segment in
// phases instead, and the bits stay: the scores of each (key head, chunk); the replay of each
// (value head, slice of V's columns), while the chain of dS goes through the segment behind in the
// same slices; then all that is left, which is independent for each (key head, chunk).

#include <gdn/kernels/cpu/gated_delta_rule.h>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "gdn/kernels/cpu/gated_delta_rule_backward.cpp"
#include <atomic>
#include <memory>
#include <vector>

#include <hwy/foreach_target.h>  // IWYU pragma: keep

#include <gdn/kernels/cpu/gated_delta_rule_tiles-inl.h>

HWY_BEFORE_NAMESPACE();
namespace gdn::kernels::cpu::HWY_NAMESPACE {

/// What all value heads of a key head share in one chunk, and sum up there.
struct SharedTiles {
  Tile q, k;        // [C, K], k right below q; normalised where the problem asks for it
  Tile kk, qk;      // [C, C], lower triangles
  Tile d_kk, d_qk;  // [C, C], sums of dG and dP over the value heads
  Tile d_q, d_k;    // [C, K], sums over the value heads
  static int64_t floats(int64_t C, int64_t K) {
    return 4 * Workspace::tile_floats(C, C) + Workspace::tile_floats(2 * C, K) +
           2 * Workspace::tile_floats(C, K);
  }
  SharedTiles(Workspace& w, int64_t C, int64_t K)
      : q(w.tile(2 * C, K)),
        kk(w.tile(C, C)),
        qk(w.tile(C, C)),
        d_kk(w.tile(C, C)),
        d_qk(w.tile(C, C)),
        d_q(w.tile(C, K)),
        d_k(w.tile(C, K)) {}
  HWY_ALIGN float q_rstd[kMaxChunk], k_rstd[kMaxChunk];  // the norm's factors
};

/// What the replay and the chain of dS leave of one chunk of a value head, for its gradients.
struct ChunkTiles {
  Tile S;      // [K, V], the state at the chunk's start
  Tile u_hat;  // [C, V]
};

/// Tiles that one chunk of a value head needs at a time.
struct BackwardTiles {
  StateTiles state;
  Tile kT;                           // [K, C]
  Tile decay, P, d_P, d_G, X;        // [C, C]
  Tile d_o, d_v;                     // [C, V], d_v right below d_o
  Tile d_u;                          // [C, V]
  Tile uT;                           // [V, C]
  Tile ST, d_ST;                     // [V, K]
  Tile d_q, d_k_reader, d_k_writer;  // [C, K]
  ChunkGates gates;
  Ahead ahead;

  static int64_t floats(int64_t C, int64_t K, int64_t V) {
    const auto tile = &Workspace::tile_floats;
    return StateTiles::floats(C, V) + 3 * tile(C, K) + tile(K, C) + 5 * tile(C, C) +
           tile(2 * C, V) + tile(C, V) + tile(V, C) + 2 * tile(V, K);
  }
  BackwardTiles(Workspace& w, int64_t C, int64_t K, int64_t V)
      : state(w, C, V),
        kT(w.tile(K, C)),
        decay(w.tile(C, C)),
        P(w.tile(C, C)),
        d_P(w.tile(C, C)),
        d_G(w.tile(C, C)),
        X(w.tile(C, C)),
        d_o(w.tile(2 * C, V)),
        d_u(w.tile(C, V)),
        uT(w.tile(V, C)),
        ST(w.tile(V, K)),
        d_ST(w.tile(V, K)),
        d_q(w.tile(C, K)),
        d_k_reader(w.tile(C, K)),
        d_k_writer(w.tile(C, K)) {}
};

/// Buffers for one key head at a time.
struct BackwardWorkspace {
  Workspace memory;
  BackwardTiles tiles;
  std::vector<Tile> d_S;            // [K, V], a value head each
  std::vector<ChunkTiles> chunks;   // of a segment
  std::vector<SharedTiles> shared;  // likewise

  static int64_t floats(int64_t C, int64_t K, int64_t V, int64_t group, int64_t chunks) {
    const auto tile = &Workspace::tile_floats;
    return BackwardTiles::floats(C, K, V) + group * tile(K, V) +
           chunks * (tile(K, V) + tile(C, V) + SharedTiles::floats(C, K));
  }
  BackwardWorkspace(int64_t C, int64_t K, int64_t V, int64_t group, int64_t count)
      : memory(floats(C, K, V, group, count)), tiles(memory, C, K, V) {
    for (int64_t i = 0; i < group; ++i) d_S.push_back(memory.tile(K, V));
    for (int64_t i = 0; i < count; ++i) {
      chunks.push_back({memory.tile(K, V), memory.tile(C, V)});
      shared.emplace_back(memory, C, K);
    }
  }
};

/// Where one chunk is: token t of the batch row, `tokens` of them, in `rows` rows of a tile.
struct Chunk {
  int64_t b, t, tokens, rows;
};

void clear_rows(const Tile& tile, int64_t rows, int64_t columns) {
  for (int64_t i = 0; i < rows; ++i) {
    std::memset(tile.row(i), 0, static_cast<size_t>(padded(columns)) * sizeof(float));
  }
}

void load_chunk_gates(const GatedDeltaRuleBackward& p, const Chunk& c, int64_t h,
                      ChunkGates& gates) {
  const int64_t gate = (c.b * p.T + c.t) * p.HV + h;
  load_gates(static_cast<const float*>(p.g) + gate, static_cast<const float*>(p.beta) + gate, p.HV,
             c.tokens, c.rows, static_cast<float>(p.scale), gates);
}

/// From the state at a chunk's start its U^ and, unless there is no memory for it, the next state.
void replay_chunk(const GatedDeltaRuleBackward& p, const Chunk& c, int64_t h,
                  const SharedTiles& shared, const ChunkTiles& chunk, const Tile& next_S,
                  BackwardTiles& w) {
  load_chunk_gates(p, c, h, w.gates);
  decay_scores(w.gates, c.rows, 1.0F, shared.kk, {}, w.state.G, {}, {});
  load_tokens(p.v, p.dtype, c.b, c.t, h, c.tokens, c.rows, p.V, chunk.u_hat);
  solve_chunk(w.ahead, shared.k, chunk.u_hat, w.state, w.gates, chunk.S, c.rows, p.K, p.V);
  if (next_S.data == nullptr) return;
  update_state(w.ahead, shared.k, w.state, w.gates, chunk.S, next_S, c.rows, p.K, p.V);
}

/// From d_P = dO U^T and d_G = dV U^T, lower triangles, in one pass:
/// X = d_P o P - d_G o G below the diagonal, 0 elsewhere; sum_P += scale d_P o D on the lower
/// triangle; sum_G -= d_G o D below the diagonal.
void score_gradients(const BackwardTiles& w, int64_t rows, float scale, const Tile& sum_P,
                     const Tile& sum_G) {
  const F32 d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  const auto factor = hn::Set(d, scale);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < rows; j += lanes) {
      if (j > i) {
        hn::Store(hn::Zero(d), d, w.X.row(i) + j);
        continue;
      }
      // Above the diagonal the products may be undefined: masked, never multiplied by zero.
      const auto lower = hn::FirstN(d, static_cast<size_t>(std::min(lanes, i + 1 - j)));
      const auto below = hn::FirstN(d, static_cast<size_t>(std::min(lanes, i - j)));
      const auto d_P = hn::IfThenElseZero(lower, hn::Load(d, w.d_P.row(i) + j));
      const auto d_G = hn::IfThenElseZero(below, hn::Load(d, w.d_G.row(i) + j));
      const auto D = hn::Load(d, w.decay.row(i) + j);
      const auto read = hn::IfThenElseZero(below, hn::Mul(d_P, hn::Load(d, w.P.row(i) + j)));
      hn::Store(hn::NegMulAdd(d_G, hn::Load(d, w.state.G.row(i) + j), read), d, w.X.row(i) + j);
      float* p = sum_P.row(i) + j;
      float* g = sum_G.row(i) + j;
      hn::Store(hn::MulAdd(hn::Mul(factor, d_P), D, hn::Load(d, p)), d, p);
      hn::Store(hn::NegMulAdd(d_G, D, hn::Load(d, g)), d, g);
    }
  }
}

/// crossing[t] = sum_{j < t <= i} X_ij. X is strictly lower; it is overwritten.
void crossing_sums(const Tile& X, int64_t rows, float* crossing) {
  const F32 d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  for (int64_t t = rows - 1; t >= 0; --t) {
    auto sum = hn::Zero(d);
    for (int64_t j = 0; j < rows; j += lanes) {
      // Row t becomes the column sums over the rows from t on; columns from t on are not asked for.
      auto column = hn::Load(d, X.row(t) + j);
      if (t + 1 < rows) column = hn::Add(column, hn::Load(d, X.row(t + 1) + j));
      hn::Store(column, d, X.row(t) + j);
      const int64_t before = std::clamp<int64_t>(t - j, 0, lanes);
      sum = hn::Add(sum, hn::IfThenElseZero(hn::FirstN(d, static_cast<size_t>(before)), column));
    }
    crossing[t] = hn::GetLane(hn::SumOfLanes(d, sum));
  }
}

/// Products of one chunk's tokens with the states around it, a term of d_g each.
struct StateProducts {
  double through;                       // exp(b_C) <dS', S>
  float read[kMaxChunk];                // q_i . dQ_i + k_i . (dK as reader)_i
  float written[kMaxChunk];             // k_j . (dK as writer)_j
  HWY_ALIGN float crossing[kMaxChunk];  // within the chunk
};

void store_gate_gradients(const GatedDeltaRuleBackward& p, const Chunk& c, int64_t h,
                          const Tile& u_hat, const Tile& d_u, const StateProducts& products) {
  const int64_t gate = (c.b * p.T + c.t) * p.HV + h;
  float* d_g = static_cast<float*>(p.d_g) + gate;
  float* d_beta = static_cast<float*>(p.d_beta) + gate;
  double written_before[kMaxChunk];
  double written = 0.0, read = 0.0;
  for (int64_t t = 0; t < c.tokens; ++t) {
    written_before[t] = written;
    written += products.written[t];
  }
  for (int64_t t = c.tokens - 1; t >= 0; --t) {
    read += products.read[t];
    d_g[t * p.HV] =
        static_cast<float>(products.through + read + written_before[t] + products.crossing[t]);
    d_beta[t * p.HV] = dot(d_u.row(t), u_hat.row(t), padded(p.V));
  }
}

/// sum += x; returns x . y. n is a multiple of kTileAlign.
HWY_INLINE float add_and_dot(const float* HWY_RESTRICT x, const float* HWY_RESTRICT y, int64_t n,
                             float* HWY_RESTRICT sum) {
  const F32 d;
  auto product = hn::Zero(d);
  for (int64_t j = 0; j < n; j += static_cast<int64_t>(hn::Lanes(d))) {
    const auto value = hn::Load(d, x + j);
    product = hn::MulAdd(value, hn::Load(d, y + j), product);
    hn::Store(hn::Add(value, hn::Load(d, sum + j)), d, sum + j);
  }
  return hn::GetLane(hn::SumOfLanes(d, product));
}

/// Gates, scores and dO of a chunk, for what follows.
void begin_reverse(const GatedDeltaRuleBackward& p, const Chunk& c, int64_t h,
                   const SharedTiles& shared, BackwardTiles& w) {
  load_chunk_gates(p, c, h, w.gates);
  w.d_v = below(w.d_o, c.rows);
  load_tokens(p.d_o, p.dtype, c.b, c.t, h, c.tokens, c.rows, p.V, w.d_o);
  decay_scores(w.gates, c.rows, static_cast<float>(p.scale), shared.kk, shared.qk, w.state.G, w.P,
               w.decay);
}

/// From d_S, which is dS': dU, then Z in its place, and dV.
void value_gradients(const GatedDeltaRuleBackward& p, const Chunk& c, int64_t h, const Tile& d_S,
                     const SharedTiles& shared, BackwardTiles& w) {
  const int64_t rows = c.rows, Vp = padded(p.V);
  matmul<Into::set>(w.ahead, rows, Vp, p.K, plain(shared.k), d_S, w.d_u, {w.gates.to_end});
  matmul<Into::add, Skip::a_below_diagonal>(w.ahead, rows, Vp, rows, transposed(w.P), w.d_o, w.d_u);
  solve_backward(w.state.G, w.gates.beta, rows, Vp, w.d_u, w.d_v);
  store_tokens(p.d_v, p.dtype, c.b, c.t, h, c.tokens, p.V, w.d_v);
}

/// What queries, keys and gates get of one value head, from dO, dV, Z and the states around the
/// chunk: adds to the sums in `shared`.
void key_gradients(const GatedDeltaRuleBackward& p, const Chunk& c, int64_t h,
                   const ChunkTiles& chunk, const Tile& d_S, const Tile& d_v, const Tile& d_u,
                   const SharedTiles& shared, BackwardTiles& w) {
  const int64_t rows = c.rows, K = p.K, V = p.V, Kp = padded(K), Vp = padded(V);
  const ChunkGates& gates = w.gates;
  const Tile& u = w.state.u;
  for (int64_t i = 0; i < rows; ++i) {
    scale_row(gates.beta[i], chunk.u_hat.row(i), 0.0F, u.row(i), Vp);
  }
  transpose(rows, Vp, u, w.uT);
  transpose(Kp, Vp, chunk.S, w.ST);
  transpose(Kp, Vp, d_S, w.d_ST);

  // Gradients of the two score matrices, and what the gates need of them.
  StateProducts products = {};
  matmul<Into::set, Skip::c_above_diagonal>(w.ahead, rows, rows, V, plain(w.d_o), w.uT, w.d_P);
  matmul<Into::set, Skip::c_above_diagonal>(w.ahead, rows, rows, V, plain(d_v), w.uT, w.d_G);
  score_gradients(w, rows, static_cast<float>(p.scale), shared.d_qk, shared.d_kk);
  crossing_sums(w.X, rows, products.crossing);

  // dQ and both parts of dK, without the products within the chunk.
  matmul<Into::set>(w.ahead, rows, Kp, V, plain(w.d_o), w.ST, w.d_q, {gates.read});
  matmul<Into::set>(w.ahead, rows, Kp, V, plain(d_v), w.ST, w.d_k_reader, {gates.minus_from_start});
  matmul<Into::set>(w.ahead, rows, Kp, V, plain(u), w.d_ST, w.d_k_writer, {gates.to_end});
  for (int64_t i = 0; i < rows; ++i) {
    products.read[i] = add_and_dot(w.d_q.row(i), shared.q.row(i), Kp, shared.d_q.row(i)) +
                       add_and_dot(w.d_k_reader.row(i), shared.k.row(i), Kp, shared.d_k.row(i));
    products.written[i] = add_and_dot(w.d_k_writer.row(i), shared.k.row(i), Kp, shared.d_k.row(i));
  }
  products.through = 0.0;
  for (int64_t i = 0; i < K; ++i) products.through += dot(d_S.row(i), chunk.S.row(i), Vp);
  products.through *= gates.whole;
  store_gate_gradients(p, c, h, chunk.u_hat, d_u, products);
}

/// dS from dS', which it may be, and from Q over K and dO over dV, which are not needed again.
void state_gradient(const GatedDeltaRuleBackward& p, const Chunk& c, const Tile& d_S_end,
                    const Tile& d_S, const SharedTiles& shared, BackwardTiles& w) {
  const int64_t Vp = padded(p.V);
  for (int64_t i = 0; i < c.rows; ++i) {
    scale_row(w.gates.read[i], w.d_o.row(i), 0.0F, w.d_o.row(i), Vp);
    scale_row(w.gates.minus_from_start[i], w.d_v.row(i), 0.0F, w.d_v.row(i), Vp);
  }
  matmul<Into::add>(w.ahead, padded(p.K), Vp, 2 * c.rows, transposed(shared.q), w.d_o, d_S,
                    {.keep = w.gates.whole, .old = d_S_end});
}

/// Writes the summed gradient of q or k for one chunk, through the L2 norm when there is one: for
/// y = x r with r = (sum(x^2) + eps)^-1/2, dx = r (dy - y (y . dy)). x holds y.
void store_key_gradient(const GatedDeltaRuleBackward& p, const MutableView4& output, const Chunk& c,
                        int64_t key_head, const Tile& gradient, const Tile& x, const float* rstd) {
  for (int64_t i = 0; p.qk_l2norm && i < c.tokens; ++i) {
    const float along = dot(x.row(i), gradient.row(i), padded(p.K));
    scale_row(-rstd[i] * along, x.row(i), rstd[i], gradient.row(i), padded(p.K));
  }
  store_tokens(output, p.dtype, c.b, c.t, key_head, c.tokens, p.K, gradient);
}

/// Queries, keys and scores of one chunk, and zeros in its sums.
void begin_key_chunk(const GatedDeltaRuleBackward& p, const Chunk& c, int64_t key_head,
                     SharedTiles& shared, BackwardTiles& w) {
  shared.k = below(shared.q, c.rows);
  load_tokens(p.q, p.dtype, c.b, c.t, key_head, c.tokens, c.rows, p.K, shared.q);
  load_tokens(p.k, p.dtype, c.b, c.t, key_head, c.tokens, c.rows, p.K, shared.k);
  if (p.qk_l2norm) {
    l2_normalize(shared.q, c.rows, p.K, shared.q_rstd);
    l2_normalize(shared.k, c.rows, p.K, shared.k_rstd);
  }
  score_products(w.ahead, shared.k, shared.q, c.rows, p.K, w.kT, shared.kk, shared.qk);
  for (const Tile& sum : {shared.d_kk, shared.d_qk}) clear_rows(sum, c.rows, c.rows);
  for (const Tile& sum : {shared.d_q, shared.d_k}) clear_rows(sum, c.rows, p.K);
}

/// dQ and dK of one chunk, from what its value heads summed up.
void finish_key_chunk(const GatedDeltaRuleBackward& p, const Chunk& c, int64_t key_head,
                      const SharedTiles& shared, Ahead& ahead) {
  const int64_t rows = c.rows, Kp = padded(p.K);
  const Tile &q = shared.q, &k = shared.k;
  constexpr auto kLower = Skip::a_above_diagonal, kUpper = Skip::a_below_diagonal;
  matmul<Into::add, kLower>(ahead, rows, Kp, rows, plain(shared.d_qk), k, shared.d_q);
  matmul<Into::add, kLower>(ahead, rows, Kp, rows, plain(shared.d_kk), k, shared.d_k);
  matmul<Into::add, kUpper>(ahead, rows, Kp, rows, transposed(shared.d_qk), q, shared.d_k);
  matmul<Into::add, kUpper>(ahead, rows, Kp, rows, transposed(shared.d_kk), k, shared.d_k);
  store_key_gradient(p, p.d_q, c, key_head, shared.d_q, q, shared.q_rstd);
  store_key_gradient(p, p.d_k, c, key_head, shared.d_k, k, shared.k_rstd);
}

/// The chunks of one segment: `tokens` tokens from the token t of batch row b.
std::vector<Chunk> chunks_of(int64_t b, int64_t t, int64_t tokens, int64_t chunk_size) {
  std::vector<Chunk> chunks;
  for (int64_t done = 0; done < tokens; done += chunk_size) {
    const int64_t here = std::min(chunk_size, tokens - done);
    chunks.push_back({b, t + done, here, padded(here)});
  }
  return chunks;
}

/// Adds what a chunk's tokens touch, if anything.
template <typename View>
void add_chunk(Ahead& ahead, const View& view, DType dtype, const Chunk& c, int64_t h,
               int64_t columns) {
  add_tokens(ahead, view, dtype, c.b, c.t, h, c.tokens, columns);
}

/// While value head h replays a chunk, what is read for the next chunk; the first head of a group
/// reads the keys too.
void look_ahead(const GatedDeltaRuleBackward& p, const Chunk& next, int64_t h, Ahead& ahead) {
  const int64_t group = p.HV / p.H;
  ahead.clear();
  for (const ConstView4* x : {&p.k, &p.q}) {
    if (h % group > 0) continue;
    add_chunk(ahead, *x, p.dtype, next, h / group, p.K);
  }
  add_chunk(ahead, p.v, p.dtype, next, h, p.V);
}

/// While value head h goes back through a chunk, what it writes there and what is read for the
/// chunk before it (null: none); the last head of a group writes the gradients of q and k too.
void look_back(const GatedDeltaRuleBackward& p, const Chunk& c, const Chunk* next, int64_t h,
               Ahead& ahead) {
  const int64_t group = p.HV / p.H;
  ahead.clear();
  if (next != nullptr) add_chunk(ahead, p.d_o, p.dtype, *next, h, p.V);
  for (const MutableView4* x : {&p.d_k, &p.d_q}) {
    if ((h + 1) % group > 0) continue;
    add_chunk(ahead, *x, p.dtype, c, h / group, p.K);
  }
  add_chunk(ahead, p.d_v, p.dtype, c, h, p.V);
}

/// State gradients of the value heads [first, first + tiles.size()) of sequence n, from what came
/// with the final state; null: zeros.
void load_state_gradients(const GatedDeltaRuleBackward& p, int64_t n, int64_t first,
                          const std::vector<Tile>& tiles) {
  const auto* d_final = static_cast<const float*>(p.d_final_state);
  for (size_t i = 0; i < tiles.size(); ++i) {
    const int64_t offset = (n * p.HV + first + static_cast<int64_t>(i)) * p.K * p.V;
    load_state(d_final == nullptr ? nullptr : d_final + offset, p.K, p.V, p.state_v_first, {0, p.V},
               tiles[i]);
  }
}

/// The inverse, to the gradients of the initial state.
void store_state_gradients(const GatedDeltaRuleBackward& p, int64_t n, int64_t first,
                           const std::vector<Tile>& tiles) {
  auto* d_initial = static_cast<float*>(p.d_initial_state);
  for (size_t i = 0; d_initial != nullptr && i < tiles.size(); ++i) {
    const int64_t offset = (n * p.HV + first + static_cast<int64_t>(i)) * p.K * p.V;
    store_state(tiles[i], p.K, p.V, p.state_v_first, {0, p.V}, d_initial + offset);
  }
}

/// The state that the forward kept at the start of a segment of sequence n, value head h.
const float* segment_state(const GatedDeltaRuleBackward& p, int64_t n, int64_t segment, int64_t h) {
  return p.segment_states + ((first_segment(p, n) + segment) * p.HV + h) * p.K * p.V;
}

std::vector<Chunk> chunks_of_segment(const GatedDeltaRuleBackward& p, const Sequence& seq,
                                     int64_t segment) {
  const int64_t done = segment * kSegmentTokens;
  return chunks_of(seq.b, seq.first_token + done, std::min(kSegmentTokens, seq.tokens - done),
                   p.chunk_size);
}

int64_t segments_of(const Sequence& seq) {
  return (seq.tokens + kSegmentTokens - 1) / kSegmentTokens;
}

void backward_group(const GatedDeltaRuleBackward& p, int64_t n, int64_t key_head,
                    BackwardWorkspace& w) {
  const Sequence seq = sequence(p, n);
  const int64_t group = p.HV / p.H;
  BackwardTiles& tiles = w.tiles;
  load_state_gradients(p, n, key_head * group, w.d_S);
  for (int64_t segment = segments_of(seq) - 1; segment >= 0; --segment) {
    const auto chunks = chunks_of_segment(p, seq, segment);
    for (int64_t i = 0; i < group; ++i) {
      const int64_t h = key_head * group + i;
      load_state(segment_state(p, n, segment, h), p.K, p.V, /*v_first=*/false, {0, p.V},
                 w.chunks[0].S);
      for (size_t c = 0; c < chunks.size(); ++c) {
        if (i == 0) begin_key_chunk(p, chunks[c], key_head, w.shared[c], tiles);
        const bool last = c + 1 == chunks.size();
        if (!last) look_ahead(p, chunks[c + 1], h, tiles.ahead);
        replay_chunk(p, chunks[c], h, w.shared[c], w.chunks[c], last ? Tile{} : w.chunks[c + 1].S,
                     tiles);
      }
      for (size_t c = chunks.size(); c-- > 0;) {
        look_back(p, chunks[c], c > 0 ? &chunks[c - 1] : nullptr, h, tiles.ahead);
        begin_reverse(p, chunks[c], h, w.shared[c], tiles);
        value_gradients(p, chunks[c], h, w.d_S[i], w.shared[c], tiles);
        key_gradients(p, chunks[c], h, w.chunks[c], w.d_S[i], tiles.d_v, tiles.d_u, w.shared[c],
                      tiles);
        state_gradient(p, chunks[c], w.d_S[i], w.d_S[i], w.shared[c], tiles);
        if (i + 1 == group) finish_key_chunk(p, chunks[c], key_head, w.shared[c], tiles.ahead);
      }
    }
  }
  store_state_gradients(p, n, key_head * group, w.d_S);
}

/// What the phases keep of one segment of a sequence, all heads.
struct SegmentTiles {
  /// Of one chunk of a value head.
  struct Values {
    ChunkTiles chunk;  // from the replay
    Tile d_S;          // [K, V], of the state at the chunk's end
    Tile d_u, d_v;     // [C, V], from the chain of dS
  };
  std::vector<std::vector<SharedTiles>> shared;  // [key head][chunk]
  std::vector<std::vector<Values>> values;       // [value head][chunk]

  static int64_t floats(const GatedDeltaRuleBackward& p, int64_t count) {
    const int64_t state = Workspace::tile_floats(p.K, p.V);
    const int64_t values = Workspace::tile_floats(p.chunk_size, p.V);
    return count * (p.H * SharedTiles::floats(p.chunk_size, p.K) + p.HV * (2 * state + 3 * values));
  }
  SegmentTiles(Workspace& w, const GatedDeltaRuleBackward& p, int64_t count)
      : shared(p.H), values(p.HV) {
    const int64_t C = p.chunk_size, K = p.K, V = p.V;
    for (auto& chunks : shared) {
      for (int64_t c = 0; c < count; ++c) chunks.emplace_back(w, C, K);
    }
    for (auto& chunks : values) {
      for (int64_t c = 0; c < count; ++c) {
        chunks.push_back({{w.tile(K, V), w.tile(C, V)}, w.tile(K, V), w.tile(C, V), w.tile(C, V)});
      }
    }
  }
};

/// Buffers of one thread in the phases.
struct ThreadWorkspace {
  Workspace memory;
  BackwardTiles tiles;
  explicit ThreadWorkspace(const GatedDeltaRuleBackward& p)
      : memory(BackwardTiles::floats(p.chunk_size, p.K, p.V)),
        tiles(memory, p.chunk_size, p.K, p.V) {}
};

/// Buffers of the phases: two segments, since one is replayed while the chain of dS goes through
/// the one behind it.
struct PhasesWorkspace {
  Workspace memory;
  std::vector<SegmentTiles> segments;
  std::vector<Tile> d_initial;                            // [K, V], a value head each
  std::vector<std::unique_ptr<ThreadWorkspace>> threads;  // each made by the thread that needs it

  PhasesWorkspace(const GatedDeltaRuleBackward& p, int64_t kept, int64_t count)
      : memory(kept * SegmentTiles::floats(p, count) + p.HV * Workspace::tile_floats(p.K, p.V),
               p.parallel_for),
        threads(static_cast<size_t>(p.threads)) {
    for (int64_t i = 0; i < kept; ++i) segments.emplace_back(memory, p, count);
    for (int64_t h = 0; h < p.HV; ++h) d_initial.push_back(memory.tile(p.K, p.V));
  }
  SegmentTiles& of(int64_t segment) {
    return segments[static_cast<size_t>(segment) % segments.size()];
  }

  /// Calls body(i, the thread's buffers) for every i below `count`; what comes first starts first.
  template <typename Body>
  void for_each(const GatedDeltaRuleBackward& p, int64_t count, const Body& body) {
    std::atomic<int64_t> next = 0;
    p.parallel_for(std::min(count, p.threads), [&](int64_t begin, int64_t end) {
      for (int64_t thread = begin; thread < end; ++thread) {
        auto& own = threads[static_cast<size_t>(thread)];
        for (int64_t i; (i = next.fetch_add(1)) < count;) {
          if (own == nullptr) own = std::make_unique<ThreadWorkspace>(p);
          body(i, *own);
        }
      }
    });
  }
};

/// `columns` of V as if these were all.
GatedDeltaRuleBackward slice_of(const GatedDeltaRuleBackward& p, const Columns& columns) {
  GatedDeltaRuleBackward slice = p;
  slice.V = columns.count;
  slice.v = columns_from(p.v, p.dtype, columns.first);
  slice.d_o = columns_from(p.d_o, p.dtype, columns.first);
  slice.d_v = columns_from(p.d_v, p.dtype, columns.first);
  return slice;
}
Tile slice_of(const Tile& tile, const Columns& columns) {
  return {tile.data + columns.first, tile.stride};
}

/// Replay of a segment's chunks from the state at its start, `columns` of value head h.
void replay_phase(const GatedDeltaRuleBackward& p, const float* first_state,
                  const std::vector<Chunk>& chunks, int64_t h, const Columns& columns,
                  const SegmentTiles& segment, BackwardTiles& w) {
  const GatedDeltaRuleBackward slice = slice_of(p, columns);
  const auto& shared = segment.shared[h / (p.HV / p.H)];
  const auto& values = segment.values[h];
  load_state(first_state, p.K, p.V, /*v_first=*/false, columns,
             slice_of(values[0].chunk.S, columns));
  for (size_t c = 0; c < chunks.size(); ++c) {
    const ChunkTiles chunk = {slice_of(values[c].chunk.S, columns),
                              slice_of(values[c].chunk.u_hat, columns)};
    const bool last = c + 1 == chunks.size();
    w.ahead.clear();
    if (!last) add_chunk(w.ahead, slice.v, p.dtype, chunks[c + 1], h, columns.count);
    replay_chunk(slice, chunks[c], h, shared[c], chunk,
                 last ? Tile{} : slice_of(values[c + 1].chunk.S, columns), w);
  }
}

/// The chain of dS back through a segment's chunks to `d_start`, the gradient of the state at its
/// start; `columns` of value head h.
void chain_phase(const GatedDeltaRuleBackward& p, const std::vector<Chunk>& chunks, int64_t h,
                 const Columns& columns, const SegmentTiles& segment, const Tile& d_start,
                 BackwardTiles& w) {
  const GatedDeltaRuleBackward slice = slice_of(p, columns);
  const auto& shared = segment.shared[h / (p.HV / p.H)];
  const auto& values = segment.values[h];
  for (size_t c = chunks.size(); c-- > 0;) {
    const Tile d_S = slice_of(values[c].d_S, columns);
    w.ahead.clear();
    if (c > 0) add_chunk(w.ahead, slice.d_o, p.dtype, chunks[c - 1], h, columns.count);
    add_chunk(w.ahead, slice.d_v, p.dtype, chunks[c], h, columns.count);
    begin_reverse(slice, chunks[c], h, shared[c], w);
    value_gradients(slice, chunks[c], h, d_S, shared[c], w);
    const Tile d_u = slice_of(values[c].d_u, columns), d_v = slice_of(values[c].d_v, columns);
    for (int64_t i = 0; i < chunks[c].rows; ++i) {
      scale_row(1.0F, w.d_u.row(i), 0.0F, d_u.row(i), padded(columns.count));
      scale_row(1.0F, w.d_v.row(i), 0.0F, d_v.row(i), padded(columns.count));
    }
    state_gradient(slice, chunks[c], d_S, slice_of(c > 0 ? values[c - 1].d_S : d_start, columns),
                   shared[c], w);
  }
}

/// The gradients of one chunk of a key head that its value heads' states and values give.
void gradient_phase(const GatedDeltaRuleBackward& p, const Chunk& chunk, size_t c, int64_t key_head,
                    const SegmentTiles& segment, BackwardTiles& w) {
  const SharedTiles& shared = segment.shared[key_head][c];
  const int64_t group = p.HV / p.H;
  for (int64_t h = key_head * group; h < (key_head + 1) * group; ++h) {
    const auto& values = segment.values[h][c];
    begin_reverse(p, chunk, h, shared, w);
    key_gradients(p, chunk, h, values.chunk, values.d_S, values.d_v, values.d_u, shared, w);
  }
  finish_key_chunk(p, chunk, key_head, shared, w.ahead);
}

/// One sequence, all heads, a segment at a time in phases.
void backward_by_phases(const GatedDeltaRuleBackward& p, int64_t n, PhasesWorkspace& w) {
  const Sequence seq = sequence(p, n);
  const int64_t segments = segments_of(seq), slices = column_slices(p.HV, p.V, p.threads);
  // The gradients of the states at the end of a segment; of the initial ones before the first.
  const auto d_ends = [&](int64_t segment) {
    if (segment < 0) return w.d_initial;
    std::vector<Tile> tiles;
    const size_t last = chunks_of_segment(p, seq, segment).size() - 1;
    for (const auto& chunks : w.of(segment).values) tiles.push_back(chunks[last].d_S);
    return tiles;
  };
  const auto scores = [&](int64_t segment) {
    const auto chunks = chunks_of_segment(p, seq, segment);
    const auto count = static_cast<int64_t>(chunks.size());
    w.for_each(p, p.H * count, [&](int64_t i, ThreadWorkspace& own) {
      begin_key_chunk(p, chunks[i % count], i / count, w.of(segment).shared[i / count][i % count],
                      own.tiles);
    });
  };
  // The chain of dS through a segment, and at the same time the replay of the one before it.
  const auto states = [&](int64_t segment) {
    const int64_t tasks = p.HV * slices, before = segment - 1;
    const int64_t chains = segment < segments ? tasks : 0, replays = segment > 0 ? tasks : 0;
    const auto d_starts = d_ends(before);
    w.for_each(p, chains + replays, [&](int64_t i, ThreadWorkspace& own) {
      const int64_t h = i % tasks / slices;
      const Columns columns = column_slice(p.V, slices, i % slices);
      if (i < chains) {
        chain_phase(p, chunks_of_segment(p, seq, segment), h, columns, w.of(segment), d_starts[h],
                    own.tiles);
      } else {
        replay_phase(p, segment_state(p, n, before, h), chunks_of_segment(p, seq, before), h,
                     columns, w.of(before), own.tiles);
      }
    });
  };
  const auto gradients = [&](int64_t segment) {
    const auto chunks = chunks_of_segment(p, seq, segment);
    const auto count = static_cast<int64_t>(chunks.size());
    w.for_each(p, p.H * count, [&](int64_t i, ThreadWorkspace& own) {
      gradient_phase(p, chunks[i % count], i % count, i / count, w.of(segment), own.tiles);
    });
  };

  load_state_gradients(p, n, 0, d_ends(segments - 1));
  for (int64_t segment = segments; segment >= 0; --segment) {
    if (segment > 0) scores(segment - 1);
    states(segment);
    if (segment < segments) gradients(segment);
  }
  store_state_gradients(p, n, 0, w.d_initial);
}

void chunk_backward(const GatedDeltaRuleBackward& p) {
  int64_t longest = 0;
  for (int64_t n = 0; n < p.N; ++n) longest = std::max(longest, sequence(p, n).tokens);
  const int64_t chunks = (std::min(longest, kSegmentTokens) + p.chunk_size - 1) / p.chunk_size;
  if (in_phases(p.N * p.H, p.threads)) {
    PhasesWorkspace workspace(p, longest > kSegmentTokens ? 2 : 1, chunks);
    for (int64_t n = 0; n < p.N; ++n) backward_by_phases(p, n, workspace);
    return;
  }
  p.parallel_for(p.N * p.H, [&](int64_t begin, int64_t end) {
    BackwardWorkspace workspace(p.chunk_size, p.K, p.V, p.HV / p.H, chunks);
    for (int64_t i = begin; i < end; ++i) backward_group(p, i / p.H, i % p.H, workspace);
  });
}

}  // namespace gdn::kernels::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace gdn::kernels::cpu {

HWY_EXPORT(chunk_backward);

void chunk_gated_delta_rule_backward(const GatedDeltaRuleBackward& p) {
  HWY_DYNAMIC_DISPATCH(chunk_backward)(p);
}

}  // namespace gdn::kernels::cpu
#endif
