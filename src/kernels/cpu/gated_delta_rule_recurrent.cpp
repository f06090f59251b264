// Recurrent forward of the gated delta rule, token by token: the kernel for decoding.
//
//   r = exp(g) S^T k      u = beta (v - r)      o = scale (exp(g) S^T q + u (k . q))
//   S <- exp(g) S + k u^T
//
// Both products with the state come from one pass over its old value, the update is a second pass.
// The columns of S are independent, so they are worked on in blocks, and the update of one step (a
// token on a block) shares its pass with the products of the next: the same block's where a token
// follows, else those of the next block or head, so that memory reads while it writes. Work is
// spread over (sequence, value head). A state kept in bf16 is rounded once a call: a single token
// works on it where it is, several on a copy in fp32.

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
inline constexpr int kColumnVectors = 4;

/// One token on one block of columns.
template <typename Element>
struct Step {
  const Element* from;  // the state before, at row 0 and the block's first column
  Element* S;           // the state behind, likewise; it may be the same memory
  int64_t stride;       // between rows of both, in elements
  const float *q, *k;   // [K]
  const float* v;       // at the block's first column
  float* o;             // likewise
  float decay;          // exp(g)
  float beta, kq;       // kq = k . q
};

/// Steps on blocks of kVectors vectors of columns, one after another. The last one's update of the
/// state waits for the next step, or for flush(): until then its S and k must stay.
template <int kVectors, typename Element>
class Steps {
 public:
  Steps(int64_t K, double scale) : K_(K), scale_(static_cast<float>(scale)) {}

  HWY_INLINE void take(const Step<Element>& step) {
    if (waits_) {
      pass<true, true>(step);
    } else {
      pass<false, true>(step);
    }
    last_ = step;
    waits_ = true;
  }
  void flush() {
    if (waits_) pass<true, false>(last_);
    waits_ = false;
  }

 private:
  using Vec = hn::Vec<F32>;

  /// One pass over the rows: the update that waits, and the products of `next` with what they make
  /// of it. On the same block the products read what the update has just stored.
  template <bool kUpdate, bool kProducts>
  HWY_INLINE void pass(const Step<Element>& next) {
    const F32 d;
    const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
    // Copies: vector stores may alias what is in memory.
    const Step<Element> last = last_;
    const int64_t K = K_, stride = next.stride;
    const Element* const from = next.from;
    const float *const q = next.q, *const k = next.k;
    Vec u[kVectors], Sk[kVectors], Sq[kVectors];
    for (int j = 0; j < kVectors; ++j) {
      Sk[j] = Sq[j] = hn::Zero(d);
      u[j] = kUpdate ? hn::Load(d, u_ + j * lanes) : hn::Zero(d);
    }
    const Vec last_decay = hn::Set(d, kUpdate ? last.decay : 0.0F);
    for (int64_t i = 0; i < K; ++i) {
      if constexpr (kUpdate) {
        const Vec ki = hn::Set(d, last.k[i]);
        for (int j = 0; j < kVectors; ++j) {
          const int64_t at = i * last.stride + j * lanes;
          const Vec s = hn::Mul(last_decay, LoadF32(d, last.from + at));
          StoreF32(d, hn::MulAdd(ki, u[j], s), last.S + at);
        }
      }
      if constexpr (kProducts) {
        const Vec ki = hn::Set(d, k[i]), qi = hn::Set(d, q[i]);
        for (int j = 0; j < kVectors; ++j) {
          const Vec s = LoadF32(d, from + i * stride + j * lanes);
          Sk[j] = hn::MulAdd(ki, s, Sk[j]);
          Sq[j] = hn::MulAdd(qi, s, Sq[j]);
        }
      }
    }
    if constexpr (!kProducts) return;
    const Vec decay = hn::Set(d, next.decay), beta = hn::Set(d, next.beta);
    const Vec kq = hn::Set(d, next.kq), factor = hn::Set(d, scale_);
    for (int j = 0; j < kVectors; ++j) {
      const Vec v = hn::Load(d, next.v + j * lanes);
      u[j] = hn::Mul(beta, hn::NegMulAdd(decay, Sk[j], v));
      hn::Store(u[j], d, u_ + j * lanes);
      const Vec o = hn::Mul(factor, hn::MulAdd(decay, Sq[j], hn::Mul(kq, u[j])));
      hn::Store(o, d, next.o + j * lanes);
    }
  }

  int64_t K_;
  float scale_;
  bool waits_ = false;
  Step<Element> last_ = {};
  HWY_ALIGN float u_[kVectors * kTileAlign];  // of the last step
};

/// Queries and keys of up to kTokenBlock tokens of one key head.
struct Keys {
  Tile q, k;  // [tokens, K]
  HWY_ALIGN float rstd[kTokenBlock];
  float kq[kTokenBlock];
};

/// Buffers of one thread, and its steps. `Element` is the type of the state that is worked on.
template <typename Element>
struct RecurrentWorkspace {
  Workspace memory;
  Keys keys[2];     // in turns: the update that waits needs those of the last step
  int current = 0;  // which of them the tokens at hand have
  Tile v, o;        // [tokens, V]
  Tile S;           // [K, V], unless the final state's memory is worked on
  Steps<kColumnVectors, Element> blocks;
  Steps<1, Element> rest;  // of the columns, where V is no multiple of a block

  RecurrentWorkspace(const GatedDeltaRuleForward& p, int64_t tokens, bool in_place)
      : memory(Workspace::tile_floats(6 * tokens, std::max(p.K, p.V)) +
               (in_place ? 0 : Workspace::tile_floats(p.K, p.V))),
        blocks(p.K, p.scale),
        rest(p.K, p.scale) {
    // One tile for all rows: clearing a padded one for each would take longer than a token.
    v = memory.tile(6 * tokens, std::max(p.K, p.V));
    o = below(v, tokens);
    Tile next = o;
    for (Keys& key : keys) {
      key.q = below(next, tokens);
      key.k = next = below(key.q, tokens);
    }
    if (!in_place) S = memory.tile(p.K, p.V);
  }
};

/// Where the final state's memory can serve as the state at hand, it is not copied to and fro.
template <typename Kept>
bool works_in_place(const GatedDeltaRuleForward& p) {
  const bool rounded_once = std::is_same_v<Kept, float> || (p.cu_seqlens == nullptr && p.T == 1);
  return p.final_state != nullptr && !p.state_v_first && p.V % kTileAlign == 0 && rounded_once;
}

void load_state(const hwy::bfloat16_t* from, int64_t K, int64_t V, bool v_first,
                const Columns& /*all*/, const Tile& state) {
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

void store_state(const Tile& state, int64_t K, int64_t V, bool v_first, const Columns& /*all*/,
                 hwy::bfloat16_t* to) {
  for (int64_t i = 0; i < K; ++i) {
    if (v_first) {
      for (int64_t j = 0; j < V; ++j) ConvertElements(state.row(i) + j, to + j * K + i, 1);
    } else {
      ConvertElements(state.row(i), to + i * V, V);
    }
  }
}

/// Queries and keys of tokens [t, t + tokens) of row b, as the recurrence wants them.
inline void load_keys(const GatedDeltaRuleForward& p, int64_t b, int64_t t, int64_t tokens,
                      int64_t key_head, Keys& keys) {
  load_tokens(p.q, p.dtype, b, t, key_head, tokens, tokens, p.K, keys.q);
  load_tokens(p.k, p.dtype, b, t, key_head, tokens, tokens, p.K, keys.k);
  if (p.qk_l2norm) {
    l2_normalize(keys.q, tokens, p.K, keys.rstd);
    l2_normalize(keys.k, tokens, p.K, keys.rstd);
  }
  for (int64_t i = 0; i < tokens; ++i) {
    keys.kq[i] = dot(keys.k.row(i), keys.q.row(i), padded(p.K));
  }
}

/// The tokens of one sequence and value head, from the state `from`; after w.blocks.flush() and
/// w.rest.flush(), S holds the state behind them. Rows of both are `stride` apart. `same_keys`: the
/// keys at hand are those of this sequence and key head, if one block holds them all.
template <typename Element>
void recur_tokens(const GatedDeltaRuleForward& p, const Sequence& seq, int64_t h, bool same_keys,
                  const Element* from, Element* S, int64_t stride, RecurrentWorkspace<Element>& w) {
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(F32()));
  float decay[kTokenBlock], beta[kTokenBlock];
  for (int64_t done = 0; done < seq.tokens; done += kTokenBlock) {
    const int64_t t = seq.first_token + done;
    const int64_t tokens = std::min(kTokenBlock, seq.tokens - done);
    if (!same_keys || tokens < seq.tokens) {
      w.current = 1 - w.current;
      load_keys(p, seq.b, t, tokens, h / (p.HV / p.H), w.keys[w.current]);
    }
    const Keys& keys = w.keys[w.current];
    load_tokens(p.v, p.dtype, seq.b, t, h, tokens, tokens, p.V, w.v);
    for (int64_t i = 0; i < tokens; ++i) {
      const int64_t gate = (seq.b * p.T + t + i) * p.HV + h;
      decay[i] = std::exp(static_cast<const float*>(p.g)[gate]);
      beta[i] = static_cast<const float*>(p.beta)[gate];
    }
    const auto take = [&](auto& steps, int64_t column) HWY_ATTR {
      for (int64_t i = 0; i < tokens; ++i) {
        const Element* const before = done + i == 0 ? from : S;
        steps.take({before + column, S + column, stride, keys.q.row(i), keys.k.row(i),
                    w.v.row(i) + column, w.o.row(i) + column, decay[i], beta[i], keys.kq[i]});
      }
    };
    const int64_t block = kColumnVectors * lanes;
    int64_t column = 0;
    for (; column + block <= padded(p.V); column += block) take(w.blocks, column);
    for (; column < padded(p.V); column += lanes) take(w.rest, column);
    if (p.o.data != nullptr) store_tokens(p.o, p.dtype, seq.b, t, h, tokens, p.V, w.o);
  }
}

/// One sequence and value head, on the final state's own memory.
template <typename Element>
void recur_in_place(const GatedDeltaRuleForward& p, int64_t n, int64_t h, bool same_keys,
                    RecurrentWorkspace<Element>& w) {
  const int64_t offset = (n * p.HV + h) * p.K * p.V;
  Element* const S = static_cast<Element*>(p.final_state) + offset;
  const Element* from = S;
  const Sequence seq = sequence(p, n);
  if (p.initial_state == nullptr) {
    std::fill_n(S, p.K * p.V, Element{});
  } else {
    from = static_cast<const Element*>(p.initial_state) + offset;
    if (seq.tokens == 0 && from != S) std::copy_n(from, p.K * p.V, S);
  }
  recur_tokens(p, seq, h, same_keys, from, S, p.V, w);
}

/// One sequence and value head, on a copy of the state, which is kept as `Kept`.
template <typename Kept>
void recur_on_copy(const GatedDeltaRuleForward& p, int64_t n, int64_t h, bool same_keys,
                   RecurrentWorkspace<float>& w) {
  const int64_t offset = (n * p.HV + h) * p.K * p.V;
  const auto* initial = static_cast<const Kept*>(p.initial_state);
  load_state(initial == nullptr ? nullptr : initial + offset, p.K, p.V, p.state_v_first, {0, p.V},
             w.S);
  recur_tokens<float>(p, sequence(p, n), h, same_keys, w.S.data, w.S.data, w.S.stride, w);
  w.blocks.flush();
  w.rest.flush();
  if (p.final_state != nullptr) {
    store_state(w.S, p.K, p.V, p.state_v_first, {0, p.V},
                static_cast<Kept*>(p.final_state) + offset);
  }
}

/// Every sequence and value head, of a state kept as `Kept`. Handed out in long runs, since the
/// first products and the last update of a run share no pass; two for each thread, since sequences
/// differ.
template <typename Kept>
void recur_heads(const GatedDeltaRuleForward& p) {
  const bool in_place = works_in_place<Kept>(p);
  const int64_t tokens = p.cu_seqlens == nullptr ? std::min(p.T, kTokenBlock) : kTokenBlock;
  const int64_t heads = p.N * p.HV, runs = std::min(heads, 2 * p.threads);
  const auto recur_run = [&](auto& workspace, int64_t run, const auto& recur) {
    const int64_t begin = heads * run / runs, end = heads * (run + 1) / runs;
    for (int64_t i = begin; i < end; ++i) {
      const bool same_keys = i > begin && i % (p.HV / p.H) != 0;
      recur(p, i / p.HV, i % p.HV, same_keys, workspace);
    }
    workspace.blocks.flush();
    workspace.rest.flush();
  };
  p.parallel_for(runs, [&](int64_t begin, int64_t end) {
    for (int64_t run = begin; run < end; ++run) {
      if (in_place) {
        RecurrentWorkspace<Kept> workspace(p, tokens, in_place);
        recur_run(workspace, run, recur_in_place<Kept>);
      } else {
        RecurrentWorkspace<float> workspace(p, tokens, in_place);
        recur_run(workspace, run, recur_on_copy<Kept>);
      }
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
