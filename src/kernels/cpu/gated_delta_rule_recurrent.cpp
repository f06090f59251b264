// Recurrent forward of the gated delta rule, token by token: the kernel for decoding.
//
//   r = exp(g) S^T k      u = beta (v - r)      o = scale (exp(g) S^T q + u (k . q))
//   S <- exp(g) S + k u^T
//
// Both products with the state come from one pass over its old value, the update is a second pass.
// The columns of S are independent, so they are worked on in blocks that stay in the L1 cache for
// all tokens at hand. Work is spread over (sequence, value head).

#include <gdn/kernels/cpu/gated_delta_rule.h>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "gdn/kernels/cpu/gated_delta_rule_recurrent.cpp"
#include <hwy/foreach_target.h>  // IWYU pragma: keep

#include <gdn/kernels/cpu/gated_delta_rule_tiles-inl.h>

HWY_BEFORE_NAMESPACE();
namespace gdn::kernels::cpu::HWY_NAMESPACE {

/// Tokens that are converted to fp32 at a time.
inline constexpr int64_t kTokenBlock = 64;
/// Vectors of state columns that are worked on together.
inline constexpr int kColumnVectors = kMicroRows;

struct RecurrentWorkspace {
  Workspace memory;
  Tile q, k;  // [kTokenBlock, K]
  Tile v, o;  // [kTokenBlock, V]
  Tile S;     // [K, V], unless the final state's memory is worked on
  HWY_ALIGN float rstd[kTokenBlock];
  float decay[kTokenBlock], beta[kTokenBlock], kq[kTokenBlock];

  RecurrentWorkspace(int64_t tokens, int64_t K, int64_t V, bool in_place)
      : memory(2 * Workspace::tile_floats(tokens, K) + 2 * Workspace::tile_floats(tokens, V) +
               (in_place ? 0 : Workspace::tile_floats(K, V))),
        q(memory.tile(tokens, K)),
        k(memory.tile(tokens, K)),
        v(memory.tile(tokens, V)),
        o(memory.tile(tokens, V)) {
    if (!in_place) S = memory.tile(K, V);
  }
};

/// `tokens` tokens on kVectors vectors of the state's columns, from `column` on.
template <int kVectors>
HWY_INLINE void recur_columns(const RecurrentWorkspace& w, const Tile& state, int64_t tokens,
                              int64_t K, float scale, int64_t column) {
  const F32 d;
  using Vec = hn::Vec<F32>;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  float* const S = state.data + column;
  for (int64_t t = 0; t < tokens; ++t) {
    const float* q = w.q.row(t);
    const float* k = w.k.row(t);
    Vec Sk[kVectors], Sq[kVectors];
    for (int j = 0; j < kVectors; ++j) Sk[j] = Sq[j] = hn::Zero(d);
    for (int64_t i = 0; i < K; ++i) {
      const Vec ki = hn::Set(d, k[i]), qi = hn::Set(d, q[i]);
      for (int j = 0; j < kVectors; ++j) {
        const Vec s = hn::LoadU(d, S + i * state.stride + j * lanes);
        Sk[j] = hn::MulAdd(ki, s, Sk[j]);
        Sq[j] = hn::MulAdd(qi, s, Sq[j]);
      }
    }
    const Vec decay = hn::Set(d, w.decay[t]), beta = hn::Set(d, w.beta[t]);
    const Vec kq = hn::Set(d, w.kq[t]), factor = hn::Set(d, scale);
    Vec u[kVectors];
    for (int j = 0; j < kVectors; ++j) {
      const Vec v = hn::Load(d, w.v.row(t) + column + j * lanes);
      u[j] = hn::Mul(beta, hn::NegMulAdd(decay, Sk[j], v));
      const Vec o = hn::Mul(factor, hn::MulAdd(decay, Sq[j], hn::Mul(kq, u[j])));
      hn::Store(o, d, w.o.row(t) + column + j * lanes);
    }
    // Backwards: the rows read last are those still in the L1 cache.
    for (int64_t i = K - 1; i >= 0; --i) {
      const Vec ki = hn::Set(d, k[i]);
      for (int j = 0; j < kVectors; ++j) {
        float* s = S + i * state.stride + j * lanes;
        hn::StoreU(hn::MulAdd(ki, u[j], hn::Mul(decay, hn::LoadU(d, s))), d, s);
      }
    }
  }
}

/// Where the final state's memory can serve as the tile, the state is not copied to and fro.
bool in_place(const GatedDeltaRuleForward& p) {
  return p.final_state != nullptr && !p.state_v_first && p.V % kTileAlign == 0;
}

void recur_head(const GatedDeltaRuleForward& p, int64_t n, int64_t h, RecurrentWorkspace& w) {
  const Sequence seq = sequence(p, n);
  const int64_t state_offset = (n * p.HV + h) * p.K * p.V;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(F32()));
  const float* initial = p.initial_state == nullptr
                             ? nullptr
                             : static_cast<const float*>(p.initial_state) + state_offset;
  float* final =
      p.final_state == nullptr ? nullptr : static_cast<float*>(p.final_state) + state_offset;
  const Tile S = in_place(p) ? Tile{final, p.V} : w.S;
  if (!in_place(p) || initial != final) load_state(initial, p.K, p.V, p.state_v_first, S);
  for (int64_t done = 0; done < seq.tokens; done += kTokenBlock) {
    const int64_t t = seq.first_token + done;
    const int64_t tokens = std::min(kTokenBlock, seq.tokens - done);
    const int64_t key_head = h / (p.HV / p.H);
    load_tokens(p.q, p.dtype, seq.b, t, key_head, tokens, tokens, p.K, w.q);
    load_tokens(p.k, p.dtype, seq.b, t, key_head, tokens, tokens, p.K, w.k);
    load_tokens(p.v, p.dtype, seq.b, t, h, tokens, tokens, p.V, w.v);
    if (p.qk_l2norm) {
      l2_normalize(w.q, tokens, p.K, w.rstd);
      l2_normalize(w.k, tokens, p.K, w.rstd);
    }
    for (int64_t i = 0; i < tokens; ++i) {
      const int64_t gate = (seq.b * p.T + t + i) * p.HV + h;
      w.decay[i] = std::exp(static_cast<const float*>(p.g)[gate]);
      w.beta[i] = static_cast<const float*>(p.beta)[gate];
      w.kq[i] = dot(w.k.row(i), w.q.row(i), padded(p.K));
    }
    const int64_t block = kColumnVectors * lanes;
    int64_t column = 0;
    for (; column + block <= padded(p.V); column += block) {
      recur_columns<kColumnVectors>(w, S, tokens, p.K, p.scale, column);
    }
    for (; column < padded(p.V); column += lanes) {
      recur_columns<1>(w, S, tokens, p.K, p.scale, column);
    }
    if (p.o.data != nullptr) store_tokens(p.o, p.dtype, seq.b, t, h, tokens, p.V, w.o);
  }
  if (final != nullptr && !in_place(p)) store_state(S, p.K, p.V, p.state_v_first, final);
}

void recurrent_forward(const GatedDeltaRuleForward& p) {
  p.parallel_for(p.N * p.HV, [&](int64_t begin, int64_t end) {
    const int64_t tokens = p.cu_seqlens == nullptr ? std::min(p.T, kTokenBlock) : kTokenBlock;
    RecurrentWorkspace workspace(tokens, p.K, p.V, in_place(p));
    for (int64_t i = begin; i < end; ++i) recur_head(p, i / p.HV, i % p.HV, workspace);
  });
}

}  // namespace gdn::kernels::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace gdn::kernels::cpu {

HWY_EXPORT(recurrent_forward);

void recurrent_gated_delta_rule(const GatedDeltaRuleForward& p) {
  HWY_DYNAMIC_DISPATCH(recurrent_forward)(p);
}

}  // namespace gdn::kernels::cpu
#endif
