// Arguments, scratch memory and launches of the Hopper backward.
#pragma once

#include <algorithm>

#include <gdn/kernels/cuda/sm90/gated_delta_rule/backward_compose.cuh>
#include <gdn/kernels/cuda/sm90/gated_delta_rule/backward_gradients.cuh>
#include <gdn/kernels/cuda/sm90/gated_delta_rule/backward_replay.cuh>
#include <gdn/kernels/cuda/sm90/gated_delta_rule/backward_scan.cuh>
#include <gdn/kernels/cuda/sm90/gated_delta_rule/backward_waves.cuh>

namespace gdn::kernels::cuda::sm90 {

/// Whether the scan gives each half of V a block of its own: while that leaves no block waiting for
/// a multiprocessor, a half of the products a chunk is the shorter chain.
inline bool scan_splits_v(int64_t sequence_heads, int multiprocessors) {
  return 2 * sequence_heads <= multiprocessors;
}

/// Tokens of the spans that the scan cuts windows of sequences into, 0 if it does not. A sequence
/// of `spans` spans takes 4 spans - 6 blocks in the first pass; both passes together cover it
/// twice, so that less than three spans gain nothing. Lengths are known to the device alone: the
/// mean decides.
inline int scan_span_tokens(const GatedDeltaRuleProblem& p, int64_t window_tokens,
                            int multiprocessors) {
  constexpr int64_t kLeastChunks = 8;  // of a span: below, launches outweigh it
  const int64_t mean_length = std::min(p.B * p.T / p.N, window_tokens);
  for (int64_t spans = multiprocessors; spans >= 3; --spans) {
    if (p.N * p.HV * (kSpanBlocks * spans - 6) > multiprocessors) continue;
    const int64_t chunks = (mean_length + kChunk * spans - 1) / (kChunk * spans);
    if (chunks >= kLeastChunks) return static_cast<int>(chunks) * kChunk;
  }
  return 0;
}

/// Arrays in scratch memory, each 128 bytes or a multiple, of a wave of p's heads.
struct ScratchLayout {
  int span_tokens;
  int64_t chunks, spans;  // times value heads, at most
  size_t carry;           // bytes

  ScratchLayout(const GatedDeltaRuleProblem& p, int64_t window_tokens, bool windows,
                int multiprocessors)
      : span_tokens(scan_span_tokens(p, window_tokens, multiprocessors)),
        chunks(most_pieces(p, kChunk, 0, window_tokens) * p.HV),
        spans(span_tokens > 0 ? most_pieces(p, span_tokens, 0, window_tokens) * p.HV : 0),
        carry(windows ? carry_bytes(p) : 0) {}

  size_t bytes() const {
    return static_cast<size_t>(chunks * kScratchBytes) +
           static_cast<size_t>(2 * spans * kStateSize) * sizeof(float) + carry;
  }
};

/// The backward of a problem with at least one sequence and head, in waves.
struct NarrowBackward {
  const GatedDeltaRuleBackward& p;
  int multiprocessors;
  BackwardPlan plan;

  NarrowBackward(const GatedDeltaRuleBackward& p, int64_t longest, size_t scratch_goal)
      : p(p), multiprocessors(sm90::multiprocessors()) {
    const auto bytes = [&](int64_t key_heads, int64_t window_tokens) {
      return layout(key_heads, window_tokens, window_tokens < longest).bytes();
    };
    // Of a chunk: a block with both halves of V takes twice as long as one with a half.
    const auto scan_time = [&](int64_t key_heads) {
      const GatedDeltaRuleProblem part = with_heads(p, key_heads);
      const int64_t heads = part.N * part.HV;
      if (const int span = scan_span_tokens(part, longest, multiprocessors); span > 0) {
        return 2.0 * span / static_cast<double>(longest);
      }
      if (scan_splits_v(heads, multiprocessors)) return 1.0;
      return 2.0 * static_cast<double>((heads + multiprocessors - 1) / multiprocessors);
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
  ScratchLayout layout(int64_t key_heads, int64_t window_tokens, bool windows) const {
    return ScratchLayout(with_heads(p, key_heads), window_tokens, windows, multiprocessors);
  }

  BackwardArguments arguments(int64_t first_key_head, int64_t window, void* scratch) const {
    const ScratchLayout at = layout(plan.key_heads, plan.window_tokens, plan.windows > 1);
    BackwardArguments arguments{};
    set_wave(p, plan, first_key_head, window, arguments);
    arguments.s = static_cast<uint8_t*>(scratch);
    arguments.d_s = arguments.s + at.chunks * kStateBytes;
    arguments.matrices = arguments.d_s + at.chunks * kStateBytes;
    arguments.u = arguments.matrices + at.chunks * kMatricesBytes;
    arguments.span_tokens = at.span_tokens;
    arguments.span_starts = reinterpret_cast<float*>(arguments.u + at.chunks * kWritesBytes);
    arguments.span_transitions = arguments.span_starts + at.spans * kStateSize;
    arguments.carry = arguments.span_transitions + at.spans * kStateSize;
    return arguments;
  }
};

template <typename Element>
void launch_replay(const BackwardArguments& arguments, Stream stream) {
  const int64_t segments = most_pieces_of_wave(arguments, kSegmentTokens);
  if (segments == 0) return;
  launch(gated_delta_rule_replay_kernel<Element>, arguments, segments * arguments.HV, kThreads,
         sizeof(ReplayShared), "gated_delta_rule_backward_sm90: replay", stream);
}

template <typename Element>
void launch_scan(const BackwardArguments& arguments, Stream stream) {
  constexpr const char* kName = "gated_delta_rule_backward_sm90: scan";
  const int64_t heads = int64_t{arguments.N} * arguments.HV;
  const auto one_half = gated_delta_rule_scan_kernel<Element, 1, Pass::kGradients>;
  if (arguments.span_tokens > 0) {
    const int64_t spans = most_pieces_of_wave(arguments, arguments.span_tokens) * arguments.HV;
    launch(gated_delta_rule_scan_kernel<Element, 1, Pass::kSpans>, arguments, kSpanBlocks * spans,
           kScanThreads<1>, sizeof(ScanShared<1>), kName, stream);
    launch(gated_delta_rule_compose_kernel, arguments, kComposeBlocks * heads, kComposeThreads, 0,
           kName, stream);
    launch(one_half, arguments, 2 * spans, kScanThreads<1>, sizeof(ScanShared<1>), kName, stream);
  } else if (scan_splits_v(heads, multiprocessors())) {
    launch(one_half, arguments, 2 * heads, kScanThreads<1>, sizeof(ScanShared<1>), kName, stream);
  } else {
    launch(gated_delta_rule_scan_kernel<Element, 2, Pass::kGradients>, arguments, heads,
           kScanThreads<2>, sizeof(ScanShared<2>), kName, stream);
  }
}

template <typename Element>
void launch_gradients(const BackwardArguments& arguments, Stream stream) {
  const int64_t blocks = std::min<int64_t>(most_pieces_of_wave(arguments, kChunk) * arguments.H,
                                           multiprocessors());
  if (blocks == 0) return;
  launch(gated_delta_rule_gradients_kernel<Element>, arguments, blocks, kGradientThreads,
         sizeof(GradientShared), "gated_delta_rule_backward_sm90: gradients", stream);
}

template <typename Element>
void launch_backward(const BackwardArguments& arguments, Stream stream) {
  launch_replay<Element>(arguments, stream);
  launch_scan<Element>(arguments, stream);
  launch_gradients<Element>(arguments, stream);
}

}  // namespace gdn::kernels::cuda::sm90
