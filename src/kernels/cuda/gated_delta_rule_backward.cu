// Host side of the portable chunked backward; the kernels stand in the headers. Segments are gone
// through from the last to the first; in each, the states are replayed from the kept one.
#include <gdn/kernels/cuda/gated_delta_rule_gradients.cuh>
#include <gdn/kernels/cuda/gated_delta_rule_launch.cuh>
#include <gdn/kernels/cuda/gated_delta_rule_reverse.cuh>

namespace gdn::kernels::cuda {
namespace {

ScratchLayout layout(const GatedDeltaRuleBackward& p, int64_t longest) {
  return ScratchLayout(p, longest, [&](const auto& add, int64_t chunks, int64_t group) {
    const int64_t matrices = group * chunks * kMatrixSize, tokens = group * chunks * kChunk;
    if (p.qk_l2norm) add(&Wave::factors, chunks * kChunk * 2);
    add(&Wave::inverse, matrices);
    add(&Wave::readers, matrices);
    add(&Wave::transposed_inverse, matrices);
    add(&Wave::keys, matrices);
    add(&Wave::carry, group * p.K * p.V);
    add(&Wave::states, group * chunks * p.K * p.V);
    add(&Wave::d_states, group * chunks * p.K * p.V);
    add(&Wave::u_hat, tokens * p.V);
    add(&Wave::z, tokens * p.V);
    add(&Wave::d_q, tokens * p.K);
    add(&Wave::d_k, tokens * p.K);
  });
}

/// What the replay of the states needs of the problem.
GatedDeltaRuleForward replayed(const GatedDeltaRuleBackward& p) {
  GatedDeltaRuleForward forward;
  static_cast<GatedDeltaRuleProblem&>(forward) = p;
  return forward;
}

template <typename T>
void run_wave(const GatedDeltaRuleBackward& p, const Wave& w, int64_t pairs, cudaStream_t stream) {
  const auto chunks = static_cast<unsigned>(w.plan.chunks);
  const auto y = static_cast<unsigned>(pairs);
  launch_matrices<T, true>(p, w, pairs, stream);
  if (chunks > 0) launch_scan<T, true>(replayed(p), w, pairs, p.segment_states, stream);
  with_scan_tiles(p.K, [&]<int kTiles>() {
    launch("reverse_scan", reverse_scan_kernel<T, kTiles>, scan_grid<kTiles>(p, pairs),
           scan_bytes(p.K, kTiles), stream, p, w);
  });
  if (chunks == 0) return;
  const dim3 slots(chunks, static_cast<unsigned>(pairs * (p.HV / p.H)));
  launch("chunk_gradients", chunk_gradients_kernel<T>, slots, sizeof(GradientMemory), stream, p, w);
  const dim3 tokens(chunks * (kChunk / (kTileThreads / kWarp)), y);
  launch("key_gradients", key_gradients_kernel<T>, tokens, 0, stream, p, w);
}

}  // namespace

int64_t chunk_gated_delta_rule_backward_scratch(const GatedDeltaRuleBackward& p, int64_t longest) {
  return layout(p, longest).bytes();
}

void chunk_gated_delta_rule_backward(const GatedDeltaRuleBackward& p, int64_t longest,
                                     void* scratch, Stream stream) {
  check_key_size(p, "chunk_gated_delta_rule_backward");
  const ScratchLayout memory = layout(p, longest);
  with_element_type(p.dtype, [&]<typename T>(T*) {
    Wave w = memory.wave(scratch);
    set_vectors<T>(p, w, p.d_o, p.d_v);
    w.q_vectors = w.q_vectors && view_aligned<T>(p.d_q);
    w.k_vectors = w.k_vectors && view_aligned<T>(p.d_k);
    w.d_o_vectors = view_aligned<T>(p.d_o);
    for (int64_t group = 0; group < w.plan.groups; ++group) {
      const int64_t pairs = memory.select(group, w);
      for (w.segment = w.plan.segments - 1; w.segment >= 0; --w.segment) {
        run_wave<T>(p, w, pairs, stream);
      }
    }
  });
}

}  // namespace gdn::kernels::cuda
