// Chunked forward of the gated delta rule. With S the state at a chunk's start, b the running sum
// of g, D_ij = exp(b_i - b_j) for j <= i:
//
//   G = strict_lower(K K^T) o D      U^ + G diag(beta) U^ = V - diag(exp b) K S      U = diag(beta)
//   U^ O = scale (diag(exp b) Q S + (lower(Q K^T) o D) U) S' = exp(b_C) S + K^T diag(exp(b_C - b))
//   U
//
// The triangular system is solved, not inverted: by blocks of rows, so that nearly all of its
// arithmetic is in the matrix micro-kernel. Work is spread over sequences and groups of value heads
// that share a key head's scores.

#include <gdn/kernels/cpu/gated_delta_rule.h>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "gdn/kernels/cpu/gated_delta_rule_forward.cpp"
#include <vector>

#include <hwy/foreach_target.h>  // IWYU pragma: keep

#include <gdn/kernels/cpu/gated_delta_rule_tiles-inl.h>

HWY_BEFORE_NAMESPACE();
namespace gdn::kernels::cpu::HWY_NAMESPACE {

/// Buffers of one task: some value heads of one key head.
struct ForwardWorkspace {
  Workspace memory;
  KeyTiles keys;
  StateTiles tiles;
  Tile kk, qk;          // [C, C]
  Tile P;               // [C, C]
  Tile o;               // [C, V]
  std::vector<Tile> S;  // [K, V], a value head each
  ChunkGates gates;

  static int64_t floats(int64_t C, int64_t K, int64_t V, int64_t heads, const Pieces& pieces) {
    const auto tile = &Workspace::tile_floats;
    return KeyTiles::floats(C, K, pieces) + StateTiles::floats(C, K, V, pieces) + 3 * tile(C, C) +
           tile(C, V) + heads * tile(K, V);
  }
  ForwardWorkspace(int64_t C, int64_t K, int64_t V, int64_t heads, const Pieces& pieces)
      : memory(floats(C, K, V, heads, pieces)),
        keys(memory, C, K, pieces),
        tiles(memory, C, K, V, pieces),
        kk(memory.tile(C, C)),
        qk(memory.tile(C, C)),
        P(memory.tile(C, C)),
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
             tokens, rows, scale, w.keys.factors, w.gates);
  load_tokens(p.v, p.dtype, seq.b, t, h, tokens, rows, p.V, w.tiles.v);
  decay_scores(w.gates, rows, scale, w.kk, w.qk, w.tiles.G, output ? w.P : Tile{}, {});
  solve_chunk(w.keys, w.tiles, w.gates, S, rows, p.K, p.V);
  if (output) {
    // 16 bits of every factor are more than an output of 16 bits shows.
    const int terms = p.dtype == DType::f32 ? kAllPieces : 2;
    multiply<Into::set>(rows, padded(p.V), p.K, w.keys.q_left, w.tiles.S, w.o, {w.gates.read},
                        terms);
    matmul<Into::add, Skip::a_above_diagonal>(rows, padded(p.V), rows, plain(w.P), w.tiles.u, w.o);
    store_tokens(p.o, p.dtype, seq.b, t, h, tokens, p.V, w.o);
  }
  update_state(w.keys, w.tiles, w.gates, S, rows, p.K, p.V);
}

/// Value heads [first_head, first_head + w.S.size()) of sequence n, all of one key head.
void forward_heads(const GatedDeltaRuleForward& p, int64_t n, int64_t first_head,
                   ForwardWorkspace& w) {
  const Sequence seq = sequence(p, n);
  const int64_t key_head = first_head / (p.HV / p.H), state_size = p.K * p.V;
  const int64_t first_state = (n * p.HV + first_head) * state_size;
  const auto* initial = static_cast<const float*>(p.initial_state);
  const auto heads = static_cast<int64_t>(w.S.size());
  for (int64_t i = 0; i < heads; ++i) {
    load_state(initial == nullptr ? nullptr : initial + first_state + i * state_size, p.K, p.V,
               p.state_v_first, w.S[i]);
  }
  for (int64_t done = 0; done < seq.tokens; done += p.chunk_size) {
    const int64_t t = seq.first_token + done;
    const int64_t tokens = std::min(p.chunk_size, seq.tokens - done), rows = padded(tokens);
    load_keys(p, seq.b, t, key_head, tokens, w.keys);
    score_products(w.keys, rows, p.K, w.kk, w.qk);
    for (int64_t i = 0; i < heads; ++i) {
      if (p.segment_states != nullptr && done % kSegmentTokens == 0) {
        const int64_t segment = first_segment(p, n) + done / kSegmentTokens;
        store_state(w.S[i], p.K, p.V, /*v_first=*/false,
                    p.segment_states + (segment * p.HV + first_head + i) * state_size);
      }
      forward_chunk(p, seq, t, tokens, first_head + i, w.S[i], w);
    }
  }
  for (int64_t i = 0; p.final_state != nullptr && i < heads; ++i) {
    store_state(w.S[i], p.K, p.V, p.state_v_first,
                static_cast<float*>(p.final_state) + first_state + i * state_size);
  }
}

void chunk_forward(const GatedDeltaRuleForward& p) {
  const int64_t heads = heads_per_task(p), tasks = p.HV / heads;
  p.parallel_for(p.N * tasks, [&](int64_t begin, int64_t end) {
    const Pieces pieces(p.dtype);
    const MatrixUnit unit(pieces.any());
    ForwardWorkspace workspace(p.chunk_size, p.K, p.V, heads, pieces);
    for (int64_t i = begin; i < end; ++i) {
      forward_heads(p, i / tasks, i % tasks * heads, workspace);
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
  const int64_t best = usable & -usable;
  if (best <= HWY_AVX3 && uses_matrix_unit()) return "AVX3 with AMX";
  return hwy::TargetName(best);
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
