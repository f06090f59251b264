// Arguments, scratch memory and launches of the Hopper backward for wide heads.
#pragma once

#include <algorithm>

#include <gdn/kernels/cuda/sm90/gated_delta_rule/backward_waves.cuh>
#include <gdn/kernels/cuda/sm90/gated_delta_rule/wide_backward_gradients.cuh>
#include <gdn/kernels/cuda/sm90/gated_delta_rule/wide_backward_scan.cuh>
#include <gdn/kernels/cuda/sm90/gated_delta_rule/wide_launch.cuh>

namespace gdn::kernels::cuda::sm90 {

/// Blocks of the gradients kernel: persistent over `chunks` chunks of key heads and halves of K.
inline int64_t wide_gradient_blocks(int64_t chunks, int multiprocessors) {
  return std::min<int64_t>(kWideHalves * chunks, multiprocessors);
}

/// Arrays in scratch memory, each 128 bytes or a multiple, of a wave of p's heads.
struct WideScratchLayout {
  int64_t entries, slices;  // of chunks and value heads, at most; and of those and slices of V
  int64_t group_sums;       // floats
  size_t carry;             // bytes

  WideScratchLayout(const GatedDeltaRuleProblem& p, int64_t window_tokens, bool windows,
                    int multiprocessors) {
    const int64_t chunks = most_pieces(p, kChunk, 0, window_tokens);
    entries = chunks * p.HV;
    slices = entries * wide_slices(p);
    group_sums =
        p.HV > p.H ? wide_gradient_blocks(chunks * p.H, multiprocessors) * kWideGroupSums : 0;
    carry = windows ? carry_bytes(p) : 0;
  }

  size_t bytes() const {
    constexpr int64_t kEntryBytes = kWideMatricesBytes + kWideHalves * sizeof(WideGateSums);
    constexpr int64_t kSliceBytes = 2 * kWideStateBytes + kWideWritesBytes;
    return static_cast<size_t>(entries * kEntryBytes + slices * kSliceBytes) +
           static_cast<size_t>(group_sums) * sizeof(float) + carry;
  }
};

/// The backward of a problem with at least one sequence and head, in waves.
struct WideBackward {
  const GatedDeltaRuleBackward& p;
  int multiprocessors;
  BackwardPlan plan;

  WideBackward(const GatedDeltaRuleBackward& p, int64_t longest, size_t scratch_goal)
      : p(p), multiprocessors(sm90::multiprocessors()) {
    const auto bytes = [&](int64_t key_heads, int64_t window_tokens) {
      return layout(key_heads, window_tokens, window_tokens < longest).bytes();
    };
    // A chunk of two slices takes 4,700 cycles, one of a single slice 3,100 (docs/hopper_wide.md).
    const auto scan_time = [&](int64_t key_heads) {
      const int64_t heads = p.N * with_heads(p, key_heads).HV;
      const int slices = wide_slices(p);
      const int groups = wide_schedule(heads, slices, multiprocessors).groups;
      const int64_t blocks = heads * ((slices + groups - 1) / groups);
      return (blocks + multiprocessors - 1) / multiprocessors * (groups == 1 ? 2 : 3);
    };
    plan = plan_backward(p, longest, scratch_goal, bytes, scan_time);
  }

  size_t scratch_bytes() const {
    return layout(plan.key_heads, plan.window_tokens, plan.windows > 1).bytes();
  }

  /// Calls body(arguments) for every wave, in order.
  template <typename Body>
  void for_each(void* scratch, const Body& body) const {
    for_each_wave(p, plan, [&](int64_t first_key_head, int64_t window) {
      body(arguments(first_key_head, window, scratch));
    });
  }

 private:
  WideScratchLayout layout(int64_t key_heads, int64_t window_tokens, bool windows) const {
    return WideScratchLayout(with_heads(p, key_heads), window_tokens, windows, multiprocessors);
  }

  WideBackwardArguments arguments(int64_t first_key_head, int64_t window, void* scratch) const {
    const WideScratchLayout at = layout(plan.key_heads, plan.window_tokens, plan.windows > 1);
    auto* s = static_cast<uint8_t*>(scratch);
    uint8_t* d_s = s + at.slices * kWideStateBytes;
    uint8_t* u = d_s + at.slices * kWideStateBytes;
    uint8_t* matrices = u + at.slices * kWideWritesBytes;
    uint8_t* gate_sums = matrices + at.entries * kWideMatricesBytes;
    WideBackwardArguments arguments{};
    set_wave(p, plan, first_key_head, window, arguments);
    arguments.slices = wide_slices(p);
    arguments.matrices = matrices;
    arguments.s = s;
    arguments.d_s = d_s;
    arguments.u = u;
    arguments.gate_sums = reinterpret_cast<WideGateSums*>(gate_sums);
    arguments.group_sums = reinterpret_cast<float*>(arguments.gate_sums + at.entries * kWideHalves);
    arguments.carry = arguments.group_sums + at.group_sums;
    return arguments;
  }
};

template <typename Element>
void launch_wide_backward_scan(const WideBackwardArguments& arguments, Stream stream) {
  constexpr const char* kName = "gated_delta_rule_backward_sm90_wide: scan";
  const int64_t heads = int64_t{arguments.N} * arguments.HV;
  const WideSchedule schedule = wide_schedule(heads, arguments.slices, multiprocessors());
  if (schedule.groups == 1) {
    launch_wide_scan(gated_delta_rule_wide_backward_scan_kernel<Element, 1>, arguments, heads,
                     schedule, sizeof(WideBackwardScanShared<1>), kName, stream);
  } else {
    launch_wide_scan(gated_delta_rule_wide_backward_scan_kernel<Element, 2>, arguments, heads,
                     schedule, sizeof(WideBackwardScanShared<2>), kName, stream);
  }
}

template <typename Element>
void launch_wide_gradients(const WideBackwardArguments& arguments, Stream stream) {
  constexpr const char* kName = "gated_delta_rule_backward_sm90_wide: gradients";
  const int64_t chunks = most_pieces_of_wave(arguments, kChunk);
  if (chunks == 0) return;
  launch(gated_delta_rule_wide_gradients_kernel<Element>, arguments,
         wide_gradient_blocks(chunks * arguments.H, multiprocessors()), kGradientThreads,
         sizeof(WideGradientShared), kName, stream);
  launch(gated_delta_rule_wide_gates_kernel, arguments,
         (chunks * arguments.HV + kWideGatesWarps - 1) / kWideGatesWarps, 32 * kWideGatesWarps, 0,
         kName, stream);
}

template <typename Element>
void launch_wide_replay(const WideBackwardArguments& arguments, Stream stream) {
  launch_wide_replay<Element>(arguments, most_pieces_of_wave(arguments, kChunk),
                              most_pieces_of_wave(arguments, kSegmentTokens), stream);
}

template <typename Element>
void launch_wide_backward(const WideBackwardArguments& arguments, Stream stream) {
  launch_wide_replay<Element>(arguments, stream);
  launch_wide_backward_scan<Element>(arguments, stream);
  launch_wide_gradients<Element>(arguments, stream);
}

}  // namespace gdn::kernels::cuda::sm90
