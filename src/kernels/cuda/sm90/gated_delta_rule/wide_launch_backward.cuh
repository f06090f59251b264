// Arguments, scratch memory and launches of the Hopper backward for wide heads.
#pragma once

#include <algorithm>

#include <gdn/kernels/cuda/sm90/gated_delta_rule/wide_backward_gradients.cuh>
#include <gdn/kernels/cuda/sm90/gated_delta_rule/wide_backward_scan.cuh>
#include <gdn/kernels/cuda/sm90/gated_delta_rule/wide_launch.cuh>

namespace gdn::kernels::cuda::sm90 {

/// Blocks of the gradients kernel: persistent over chunks, key heads and halves of K.
inline int64_t wide_gradient_blocks(const GatedDeltaRuleProblem& p, int multiprocessors) {
  return std::min<int64_t>(kWideHalves * most_pieces(p, kChunk) * p.H, multiprocessors);
}

/// Arrays in scratch memory, each 128 bytes or a multiple.
struct WideScratchLayout {
  int64_t entries, slices;  // of chunks and value heads, at most; and of those and slices of V
  int64_t group_sums;       // floats

  WideScratchLayout(const GatedDeltaRuleProblem& p, int multiprocessors)
      : entries(wide_entries(p)),
        slices(entries * wide_slices(p)),
        group_sums(p.HV > p.H ? wide_gradient_blocks(p, multiprocessors) * kWideGroupSums : 0) {}

  size_t bytes() const {
    constexpr int64_t kEntryBytes = kWideMatricesBytes + kWideHalves * sizeof(WideGateSums);
    constexpr int64_t kSliceBytes = 2 * kWideStateBytes + kWideWritesBytes;
    return static_cast<size_t>(entries * kEntryBytes + slices * kSliceBytes) +
           static_cast<size_t>(group_sums) * sizeof(float);
  }
};

inline WideBackwardArguments wide_backward_arguments(const GatedDeltaRuleBackward& p,
                                                     void* scratch) {
  const WideScratchLayout layout(p, multiprocessors());
  auto* s = static_cast<uint8_t*>(scratch);
  uint8_t* d_s = s + layout.slices * kWideStateBytes;
  uint8_t* u = d_s + layout.slices * kWideStateBytes;
  uint8_t* matrices = u + layout.slices * kWideWritesBytes;
  uint8_t* gate_sums = matrices + layout.entries * kWideMatricesBytes;
  WideBackwardArguments arguments{};
  set_wide_problem(p, matrices, arguments);
  arguments.segment_states = p.segment_states;
  arguments.d_o = tensor_map(p, p.d_o, p.HV, p.V);
  arguments.d_v = tensor_map(p, p.d_v, p.HV, p.V);
  arguments.d_o_view = p.d_o;
  arguments.d_q = p.d_q;
  arguments.d_k = p.d_k;
  arguments.d_v_view = p.d_v;
  arguments.d_g = static_cast<float*>(p.d_g);
  arguments.d_beta = static_cast<float*>(p.d_beta);
  arguments.d_final_state = static_cast<const float*>(p.d_final_state);
  arguments.d_initial_state = static_cast<float*>(p.d_initial_state);
  arguments.s = s;
  arguments.d_s = d_s;
  arguments.u = u;
  arguments.gate_sums = reinterpret_cast<WideGateSums*>(gate_sums);
  arguments.group_sums =
      reinterpret_cast<float*>(arguments.gate_sums + layout.entries * kWideHalves);
  return arguments;
}

template <typename Element>
void launch_wide_backward_scan(const GatedDeltaRuleBackward& p,
                               const WideBackwardArguments& arguments, const WideSchedule& schedule,
                               Stream stream) {
  constexpr const char* kName = "gated_delta_rule_backward_sm90_wide: scan";
  const int64_t heads = p.N * p.HV;
  if (schedule.groups == 1) {
    launch_wide_scan(gated_delta_rule_wide_backward_scan_kernel<Element, 1>, arguments, heads,
                     schedule, sizeof(WideBackwardScanShared<1>), kName, stream);
  } else {
    launch_wide_scan(gated_delta_rule_wide_backward_scan_kernel<Element, 2>, arguments, heads,
                     schedule, sizeof(WideBackwardScanShared<2>), kName, stream);
  }
}

template <typename Element>
void launch_wide_gradients(const GatedDeltaRuleBackward& p, const WideBackwardArguments& arguments,
                           Stream stream) {
  constexpr const char* kName = "gated_delta_rule_backward_sm90_wide: gradients";
  const int64_t blocks = wide_gradient_blocks(p, multiprocessors());
  if (blocks == 0) return;
  launch(gated_delta_rule_wide_gradients_kernel<Element>, arguments, blocks, kGradientThreads,
         sizeof(WideGradientShared), kName, stream);
  const int64_t warps = wide_entries(p);
  launch(gated_delta_rule_wide_gates_kernel, arguments,
         (warps + kWideGatesWarps - 1) / kWideGatesWarps, 32 * kWideGatesWarps, 0, kName, stream);
}

template <typename Element>
void launch_wide_backward(const GatedDeltaRuleBackward& p, const WideBackwardArguments& arguments,
                          Stream stream) {
  launch_wide_replay<Element>(p, arguments, stream);
  launch_wide_backward_scan<Element>(
      p, arguments, wide_schedule(p.N * p.HV, arguments.slices, multiprocessors()), stream);
  launch_wide_gradients<Element>(p, arguments, stream);
}

}  // namespace gdn::kernels::cuda::sm90
