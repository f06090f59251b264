// Recurrent forward of the gated delta rule, token by token: the kernel for decoding.
//
//   r = exp(g) S^T k      u = beta (v - r)      o = scale (exp(g) S^T q + u (k . q))
//   S <- exp(g) S + k u^T
//
// Both products with the state come from one pass over its old value, the update is a second pass.
// The columns of S are independent, so they are worked on in blocks that stay in the L1 cache for
// all tokens at hand. Work is spread over (sequence, value head). A state kept in bf16 is rounded
// once a call: a single token works on it where it is, several on a copy in fp32.

#include <gdn/kernels/cpu/gated_delta_rule.h>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "gdn/kernels/cpu/gated_delta_rule_recurrent.cpp"
#include <algorithm>
#include <type_traits>

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

  /// One tile for all rows: clearing a padded one for each would take longer than a token.
  RecurrentWorkspace(int64_t tokens, int64_t K, int64_t V, bool in_place)
      : memory(Workspace::tile_floats(4 * tokens, std::max(K, V)) +
               (in_place ? 0 : Workspace::tile_floats(K, V))),
        q(memory.tile(4 * tokens, std::max(K, V))),
        k(below(q, tokens)),
        v(below(k, tokens)),
        o(below(v, tokens)) {
    if (!in_place) S = memory.tile(K, V);
  }
};

/// A state [K, V] at hand, in fp32 or bf16.
template <typename Element>
struct StateRows {
  Element* data;
  int64_t stride;
};

/// `tokens` tokens on kVectors vectors of the state's columns, from `column` on.
template <int kVectors, typename Element>
HWY_INLINE void recur_columns(const RecurrentWorkspace& w, const StateRows<Element>& state,
                              int64_t tokens, int64_t K, float scale, int64_t column) {
  const F32 d;
  using Vec = hn::Vec<F32>;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  Element* const S = state.data + column;
  const int64_t stride = state.stride;  // a copy: vector stores may alias what is in memory
  for (int64_t t = 0; t < tokens; ++t) {
    const float* q = w.q.row(t);
    const float* k = w.k.row(t);
    Vec Sk[kVectors], Sq[kVectors];
    for (int j = 0; j < kVectors; ++j) Sk[j] = Sq[j] = hn::Zero(d);
    for (int64_t i = 0; i < K; ++i) {
      const Vec ki = hn::Set(d, k[i]), qi = hn::Set(d, q[i]);
      for (int j = 0; j < kVectors; ++j) {
        const Vec s = LoadF32(d, S + i * stride + j * lanes);
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
        Element* s = S + i * stride + j * lanes;
        StoreF32(d, hn::MulAdd(ki, u[j], hn::Mul(decay, LoadF32(d, s))), s);
      }
    }
  }
}

/// Where the final state's memory can serve as the state at hand, it is not copied to and fro.
template <typename Element>
bool in_place(const GatedDeltaRuleForward& p) {
  const bool rounded_once =
      std::is_same_v<Element, float> ||
      (p.cu_seqlens == nullptr && p.T == 1 && p.initial_state == p.final_state);
  return p.final_state != nullptr && !p.state_v_first && p.V % kTileAlign == 0 && rounded_once;
}

void load_state(const hwy::bfloat16_t* from, int64_t K, int64_t V, bool v_first,
                const Tile& state) {
  for (int64_t i = 0; i < K; ++i) {
    if (from == nullptr) {
      std::fill_n(state.row(i), V, 0.0F);
    } else if (v_first) {
      for (int64_t j = 0; j < V; ++j) ConvertElements(from + j * K + i, state.row(i) + j, 1);
    } else {
      ConvertElements(from + i * V, state.row(i), V);
    }
  }
}

void store_state(const Tile& state, int64_t K, int64_t V, bool v_first, hwy::bfloat16_t* to) {
  for (int64_t i = 0; i < K; ++i) {
    if (v_first) {
      for (int64_t j = 0; j < V; ++j) ConvertElements(state.row(i) + j, to + j * K + i, 1);
    } else {
      ConvertElements(state.row(i), to + i * V, V);
    }
  }
}

/// Queries and keys of tokens [t, t + tokens) of row b, one key head, as the recurrence wants them.
inline void load_keys(const GatedDeltaRuleForward& p, int64_t b, int64_t t, int64_t tokens,
                      int64_t key_head, RecurrentWorkspace& w) {
  load_tokens(p.q, p.dtype, b, t, key_head, tokens, tokens, p.K, w.q);
  load_tokens(p.k, p.dtype, b, t, key_head, tokens, tokens, p.K, w.k);
  if (p.qk_l2norm) {
    l2_normalize(w.q, tokens, p.K, w.rstd);
    l2_normalize(w.k, tokens, p.K, w.rstd);
  }
  for (int64_t i = 0; i < tokens; ++i) w.kq[i] = dot(w.k.row(i), w.q.row(i), padded(p.K));
}

/// The tokens of one sequence and value head; S holds the state before, and then after them.
/// `same_keys`: w holds the keys of this sequence and key head already, if they are one block.
template <typename Element>
void recur_tokens(const GatedDeltaRuleForward& p, const Sequence& seq, int64_t h, bool same_keys,
                  RecurrentWorkspace& w, const StateRows<Element>& S) {
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(F32()));
  for (int64_t done = 0; done < seq.tokens; done += kTokenBlock) {
    const int64_t t = seq.first_token + done;
    const int64_t tokens = std::min(kTokenBlock, seq.tokens - done);
    if (!same_keys || tokens < seq.tokens) {
      load_keys(p, seq.b, t, tokens, h / (p.HV / p.H), w);
    }
    load_tokens(p.v, p.dtype, seq.b, t, h, tokens, tokens, p.V, w.v);
    for (int64_t i = 0; i < tokens; ++i) {
      const int64_t gate = (seq.b * p.T + t + i) * p.HV + h;
      w.decay[i] = std::exp(static_cast<const float*>(p.g)[gate]);
      w.beta[i] = static_cast<const float*>(p.beta)[gate];
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
}

template <typename Element>
void recur_head(const GatedDeltaRuleForward& p, int64_t n, int64_t h, bool same_keys,
                RecurrentWorkspace& w) {
  const Sequence seq = sequence(p, n);
  const int64_t offset = (n * p.HV + h) * p.K * p.V;
  const Element* initial = nullptr;
  if (p.initial_state != nullptr) initial = static_cast<const Element*>(p.initial_state) + offset;
  Element* final = nullptr;
  if (p.final_state != nullptr) final = static_cast<Element*>(p.final_state) + offset;
  if (in_place<Element>(p)) {
    if constexpr (std::is_same_v<Element, float>) {
      if (initial != final) load_state(initial, p.K, p.V, /*v_first=*/false, Tile{final, p.V});
    }
    return recur_tokens(p, seq, h, same_keys, w, StateRows<Element>{final, p.V});
  }
  load_state(initial, p.K, p.V, p.state_v_first, w.S);
  recur_tokens(p, seq, h, same_keys, w, StateRows<float>{w.S.data, w.S.stride});
  if (final != nullptr) store_state(w.S, p.K, p.V, p.state_v_first, final);
}

template <typename Element>
void recur_heads(const GatedDeltaRuleForward& p) {
  p.parallel_for(p.N * p.HV, [&](int64_t begin, int64_t end) {
    const int64_t tokens = p.cu_seqlens == nullptr ? std::min(p.T, kTokenBlock) : kTokenBlock;
    RecurrentWorkspace workspace(tokens, p.K, p.V, in_place<Element>(p));
    for (int64_t i = begin; i < end; ++i) {
      const bool same_keys = i > begin && i % (p.HV / p.H) != 0;
      recur_head<Element>(p, i / p.HV, i % p.HV, same_keys, workspace);
    }
  });
}

void recurrent_forward(const GatedDeltaRuleForward& p) {
  if (p.state_dtype == DType::bf16) return recur_heads<hwy::bfloat16_t>(p);
  recur_heads<float>(p);
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
