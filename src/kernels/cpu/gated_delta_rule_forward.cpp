// Chunked forward of the gated delta rule. With S the state at a chunk's start, b the running sum
// of g, D_ij = exp(b_i - b_j) for j <= i:
//
//   G = strict_lower(K K^T) o D
//   U^ + G diag(beta) U^ = V - diag(exp b) K S
//   U  = diag(beta) U^
//   O  = scale (diag(exp b) Q S + (lower(Q K^T) o D) U)
//   S' = exp(b_C) S + K^T diag(exp(b_C - b)) U
//
// The triangular system is solved, not inverted: by blocks of rows, so that nearly all of its
// arithmetic is in the matrix micro-kernel. Work is spread over sequences, groups of value heads
// that share a key head's scores, and, where these are fewer than threads, slices of V's columns.

#include <gdn/kernels/cpu/gated_delta_rule.h>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "gdn/kernels/cpu/gated_delta_rule_forward.cpp"
#include <vector>

#include <hwy/foreach_target.h>  // IWYU pragma: keep

#include <gdn/kernels/cpu/gated_delta_rule_tiles-inl.h>

HWY_BEFORE_NAMESPACE();
namespace gdn::kernels::cpu::HWY_NAMESPACE {

/// Buffers of one task: some value heads of one key head, V columns of each.
struct ForwardWorkspace {
  Workspace memory;
  StateTiles tiles;
  Tile q, k;            // [C, K]
  Tile kT;              // [K, C]
  Tile kk, qk;          // [C, C]
  Tile P;               // [C, C]
  Tile v, o;            // [C, V]
  std::vector<Tile> S;  // [K, V], a value head each
  ChunkGates gates;
  Ahead ahead;

  static int64_t floats(int64_t C, int64_t K, int64_t V, int64_t heads) {
    const auto tile = &Workspace::tile_floats;
    return StateTiles::floats(C, V) + 2 * tile(C, K) + tile(K, C) + 3 * tile(C, C) +
           2 * tile(C, V) + heads * tile(K, V);
  }
  ForwardWorkspace(int64_t C, int64_t K, int64_t V, int64_t heads)
      : memory(floats(C, K, V, heads)),
        tiles(memory, C, V),
        q(memory.tile(C, K)),
        k(memory.tile(C, K)),
        kT(memory.tile(K, C)),
        kk(memory.tile(C, C)),
        qk(memory.tile(C, C)),
        P(memory.tile(C, C)),
        v(memory.tile(C, V)),
        o(memory.tile(C, V)) {
    for (int64_t i = 0; i < heads; ++i) S.push_back(memory.tile(K, V));
  }
};

/// One chunk of value head h, whose state is S; the key head's tiles are loaded.
void forward_chunk(const GatedDeltaRuleForward& p, const Sequence& seq, int64_t t, int64_t tokens,
                   int64_t h, const Tile& S, ForwardWorkspace& w) {
  const int64_t rows = padded(tokens), gate = (seq.b * p.T + t) * p.HV + h;
  const auto scale = static_cast<float>(p.scale);
  const bool output = p.o.data != nullptr;
  load_gates(static_cast<const float*>(p.g) + gate, static_cast<const float*>(p.beta) + gate, p.HV,
             tokens, rows, scale, w.gates);
  load_tokens(p.v, p.dtype, seq.b, t, h, tokens, rows, p.V, w.v);
  decay_scores(w.gates, rows, scale, w.kk, w.qk, w.tiles.G, output ? w.P : Tile{}, {});
  solve_chunk(w.ahead, w.k, w.v, w.tiles, w.gates, S, rows, p.K, p.V);
  if (output) {
    matmul<Into::set>(w.ahead, rows, padded(p.V), p.K, plain(w.q), S, w.o, {w.gates.read});
    matmul<Into::add, Skip::a_above_diagonal>(w.ahead, rows, padded(p.V), rows, plain(w.P),
                                              w.tiles.u, w.o);
    store_tokens(p.o, p.dtype, seq.b, t, h, tokens, p.V, w.o);
  }
  update_state(w.ahead, w.k, w.tiles, w.gates, S, S, rows, p.K, p.V);
}

/// What value head h writes of the chunk at `done`, and what is read for the next chunk.
void look_ahead(const GatedDeltaRuleForward& p, const Sequence& seq, int64_t done, int64_t h,
                bool keys, Ahead& ahead) {
  const int64_t t = seq.first_token + done, next = t + p.chunk_size;
  const int64_t tokens = std::min(p.chunk_size, seq.tokens - done);
  const int64_t next_tokens = std::min(p.chunk_size, seq.tokens - done - p.chunk_size);
  ahead.clear();
  for (const ConstView4* x : {&p.k, &p.q}) {
    if (keys) add_tokens(ahead, *x, p.dtype, seq.b, next, h / (p.HV / p.H), next_tokens, p.K);
  }
  add_tokens(ahead, p.v, p.dtype, seq.b, next, h, next_tokens, p.V);
  add_tokens(ahead, p.o, p.dtype, seq.b, t, h, tokens, p.V);
}

/// `columns` of value heads [first_head, first_head + w.S.size()) of sequence n, all of one key
/// head.
void forward_heads(const GatedDeltaRuleForward& p, int64_t n, int64_t first_head,
                   const Columns& columns, ForwardWorkspace& w) {
  GatedDeltaRuleForward slice = p;  // as if these were all columns, but for the states
  slice.V = columns.count;
  slice.v = columns_from(p.v, p.dtype, columns.first);
  slice.o = columns_from(p.o, p.dtype, columns.first);
  const Sequence seq = sequence(p, n);
  const int64_t key_head = first_head / (p.HV / p.H), state_size = p.K * p.V;
  const int64_t first_state = (n * p.HV + first_head) * state_size;
  const auto* initial = static_cast<const float*>(p.initial_state);
  const auto heads = static_cast<int64_t>(w.S.size());
  for (int64_t i = 0; i < heads; ++i) {
    load_state(initial == nullptr ? nullptr : initial + first_state + i * state_size, p.K, p.V,
               p.state_v_first, columns, w.S[i]);
  }
  HWY_ALIGN float rstd[kMaxChunk];
  for (int64_t done = 0; done < seq.tokens; done += p.chunk_size) {
    const int64_t t = seq.first_token + done;
    const int64_t tokens = std::min(p.chunk_size, seq.tokens - done), rows = padded(tokens);
    const bool output = p.o.data != nullptr;
    load_tokens(p.k, p.dtype, seq.b, t, key_head, tokens, rows, p.K, w.k);
    if (p.qk_l2norm) l2_normalize(w.k, rows, p.K, rstd);
    if (output) {
      load_tokens(p.q, p.dtype, seq.b, t, key_head, tokens, rows, p.K, w.q);
      if (p.qk_l2norm) l2_normalize(w.q, rows, p.K, rstd);
    }
    score_products(w.ahead, w.k, output ? w.q : Tile{}, rows, p.K, w.kT, w.kk, w.qk);
    for (int64_t i = 0; i < heads; ++i) {
      if (p.segment_states != nullptr && done % kSegmentTokens == 0) {
        const int64_t segment = first_segment(p, n) + done / kSegmentTokens;
        store_state(w.S[i], p.K, p.V, /*v_first=*/false, columns,
                    p.segment_states + (segment * p.HV + first_head + i) * state_size);
      }
      look_ahead(slice, seq, done, first_head + i, /*keys=*/i == 0, w.ahead);
      forward_chunk(slice, seq, t, tokens, first_head + i, w.S[i], w);
    }
  }
  for (int64_t i = 0; p.final_state != nullptr && i < heads; ++i) {
    store_state(w.S[i], p.K, p.V, p.state_v_first, columns,
                static_cast<float*>(p.final_state) + first_state + i * state_size);
  }
}

void chunk_forward(const GatedDeltaRuleForward& p) {
  const int64_t heads = heads_per_task(p), tasks = p.N * p.HV / heads;
  const int64_t slices = column_slices(tasks, p.V, p.threads);
  const int64_t widest = column_slice(p.V, slices, slices - 1).count;
  p.parallel_for(tasks * slices, [&](int64_t begin, int64_t end) {
    ForwardWorkspace workspace(p.chunk_size, p.K, padded(widest), heads);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first_head = i / slices * heads;  // over all sequences
      forward_heads(p, first_head / p.HV, first_head % p.HV, column_slice(p.V, slices, i % slices),
                    workspace);
    }
  });
}

}  // namespace gdn::kernels::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace gdn::kernels::cpu {

HWY_EXPORT(chunk_forward);

void chunk_gated_delta_rule(const GatedDeltaRuleForward& p) {
  HWY_DYNAMIC_DISPATCH(chunk_forward)(p);
}

const char* instruction_set() {
  const int64_t usable = hwy::SupportedTargets() & HWY_TARGETS;  // lower bits stand for better ones
  return hwy::TargetName(usable & -usable);
}

std::vector<const char*> compiled_instruction_sets() {
  std::vector<const char*> names;
  for (int64_t rest = HWY_TARGETS; rest != 0; rest &= rest - 1) {
    names.push_back(hwy::TargetName(rest & -rest));
  }
  return names;
}

}  // namespace gdn::kernels::cpu
#endif
