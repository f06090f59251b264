// Host side of the portable chunked forward; the kernels stand in the headers.
#include <gdn/kernels/cuda/gated_delta_rule_launch.cuh>

namespace gdn::kernels::cuda {
namespace {

/// Scratch arrays of the forward.
ScratchLayout layout(const GatedDeltaRuleForward& p, int64_t longest) {
  return ScratchLayout(p, longest, [&](const auto& add, int64_t chunks, int64_t group) {
    if (p.qk_l2norm) add(&Wave::factors, chunks * kChunk * 2);
    add(&Wave::inverse, group * chunks * kMatrixSize);
    add(&Wave::readers, group * chunks * kMatrixSize);
    add(&Wave::carry, group * p.K * p.V);
  });
}

}  // namespace

int64_t chunk_gated_delta_rule_scratch(const GatedDeltaRuleForward& p, int64_t longest) {
  return layout(p, longest).bytes();
}

void chunk_gated_delta_rule(const GatedDeltaRuleForward& p, int64_t longest, void* scratch,
                            Stream stream) {
  check_key_size(p, "chunk_gated_delta_rule");
  const ScratchLayout memory = layout(p, longest);
  with_element_type(p.dtype, [&]<typename T>(T*) {
    Wave w = memory.wave(scratch);
    set_vectors<T>(p, w, p.o);
    for (int64_t group = 0; group < w.plan.groups; ++group) {
      const int64_t pairs = memory.select(group, w);
      for (w.segment = 0; w.segment < w.plan.segments; ++w.segment) {
        launch_matrices<T, false>(p, w, pairs, stream);
        launch_scan<T, false>(p, w, pairs, nullptr, stream);
      }
    }
  });
}

}  // namespace gdn::kernels::cuda
