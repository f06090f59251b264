// Chunked forward of the gated delta rule. With S the state at a chunk's start, b the running sum
// of g, D_ij = exp(b_i - b_j) for j <= i:
//
//   G = strict_lower(K K^T) o D      U^ + G diag(beta) U^ = V - diag(exp b) K S      U = diag(beta)
//   U^ O = scale (diag(exp b) Q S + (lower(Q K^T) o D) U) S' = exp(b_C) S + K^T diag(exp(b_C - b))
//   U
//
// The triangular system is solved, not inverted: by blocks of rows, so that nearly all of its
// arithmetic is in the matrix micro-kernel. Work is spread over (sequence, value head).

#include <gdn/kernels/cpu/gated_delta_rule.h>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "gdn/kernels/cpu/gated_delta_rule_forward.cpp"
#include <hwy/foreach_target.h>  // IWYU pragma: keep

#include <gdn/kernels/cpu/gated_delta_rule_tiles-inl.h>

HWY_BEFORE_NAMESPACE();
namespace gdn::kernels::cpu::HWY_NAMESPACE {

/// Buffers for one value head at a time.
struct ForwardWorkspace {
  Workspace memory;
  StateTiles state_tiles;
  Tile q;  // [C, K]
  Tile P;  // [C, C]
  Tile o;  // [C, V]
  Tile S;  // [K, V]
  ChunkGates gates;

  ForwardWorkspace(int64_t C, int64_t K, int64_t V)
      : memory(StateTiles::floats(C, K, V) + Workspace::tile_floats(C, K) +
               Workspace::tile_floats(C, C) + Workspace::tile_floats(C, V) +
               Workspace::tile_floats(K, V)),
        state_tiles(memory, C, K, V),
        q(memory.tile(C, K)),
        P(memory.tile(C, C)),
        o(memory.tile(C, V)),
        S(memory.tile(K, V)) {}
};

/// O of one chunk, from U in state_tiles.u and the state at the chunk's start.
void output(const GatedDeltaRuleForward& p, const Sequence& seq, int64_t t, int64_t h,
            int64_t tokens, int64_t rows, ForwardWorkspace& w) {
  const StateTiles& tiles = w.state_tiles;
  HWY_ALIGN float rstd[kMaxChunk];
  load_tokens(p.q, p.dtype, seq.b, t, h / (p.HV / p.H), tokens, rows, p.K, w.q);
  if (p.qk_l2norm) l2_normalize(w.q, rows, p.K, rstd);
  matmul<Into::set, Skip::c_above_diagonal>(rows, rows, p.K, plain(w.q), tiles.kT, w.P);
  mask_with_decay(tiles.decay, rows, p.scale, /*strict=*/false, w.P);
  for (int64_t i = 0; i < rows; ++i) {
    scale_row(p.scale * w.gates.from_start[i], w.q.row(i), 0.0F, w.q.row(i), padded(p.K));
  }
  matmul<Into::set>(rows, padded(p.V), p.K, plain(w.q), w.S, w.o);
  matmul<Into::add, Skip::a_above_diagonal>(rows, padded(p.V), rows, plain(w.P), tiles.u, w.o);
  store_tokens(p.o, p.dtype, seq.b, t, h, tokens, p.V, w.o);
}

void forward_head(const GatedDeltaRuleForward& p, int64_t n, int64_t h, ForwardWorkspace& w) {
  const Sequence seq = sequence(p, n);
  const StateTiles& tiles = w.state_tiles;
  const int64_t state_offset = (n * p.HV + h) * p.K * p.V;
  const auto* initial = static_cast<const float*>(p.initial_state);
  load_state(initial == nullptr ? nullptr : initial + state_offset, p.K, p.V, p.state_v_first, w.S);

  float* segment_state = nullptr;
  if (p.segment_states != nullptr) {
    segment_state = p.segment_states + (first_segment(p, n) * p.HV + h) * p.K * p.V;
  }
  HWY_ALIGN float rstd[kMaxChunk];
  for (int64_t done = 0; done < seq.tokens; done += p.chunk_size) {
    const int64_t t = seq.first_token + done;
    const int64_t tokens = std::min(p.chunk_size, seq.tokens - done);
    const int64_t rows = padded(tokens);
    if (segment_state != nullptr && done % kSegmentTokens == 0) {
      store_state(w.S, p.K, p.V, /*v_first=*/false, segment_state);
      segment_state += p.HV * p.K * p.V;
    }
    const int64_t gate = (seq.b * p.T + t) * p.HV + h;
    load_gates(static_cast<const float*>(p.g) + gate, static_cast<const float*>(p.beta) + gate,
               p.HV, tokens, rows, w.gates);
    load_tokens(p.k, p.dtype, seq.b, t, h / (p.HV / p.H), tokens, rows, p.K, tiles.k);
    if (p.qk_l2norm) l2_normalize(tiles.k, rows, p.K, rstd);
    load_tokens(p.v, p.dtype, seq.b, t, h, tokens, rows, p.V, tiles.v);

    key_products(tiles, w.gates, rows, p.K);
    solve_chunk(tiles, w.gates, w.S, rows, p.K, p.V);
    if (p.o.data != nullptr) output(p, seq, t, h, tokens, rows, w);
    update_state(tiles, w.gates, w.S, rows, p.K, p.V);
  }
  if (p.final_state != nullptr) {
    store_state(w.S, p.K, p.V, p.state_v_first, static_cast<float*>(p.final_state) + state_offset);
  }
}

void chunk_forward(const GatedDeltaRuleForward& p) {
  p.parallel_for(p.N * p.HV, [&](int64_t begin, int64_t end) {
    ForwardWorkspace workspace(p.chunk_size, p.K, p.V);
    for (int64_t i = begin; i < end; ++i) forward_head(p, i / p.HV, i % p.HV, workspace);
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
