// Arguments, scratch memory and launches of the Hopper backward.
#pragma once

#include <algorithm>

#include <gdn/kernels/cuda/sm90/gated_delta_rule/backward_gradients.cuh>
#include <gdn/kernels/cuda/sm90/gated_delta_rule/backward_replay.cuh>
#include <gdn/kernels/cuda/sm90/gated_delta_rule/backward_scan.cuh>
#include <gdn/kernels/cuda/sm90/gated_delta_rule/launch.cuh>

namespace gdn::kernels::cuda::sm90 {

/// Whether the scan gives each half of V a block of its own: while that leaves no block waiting for
/// a multiprocessor, a half of the products a chunk is the shorter chain.
inline bool scan_splits_v(int64_t sequence_heads, int multiprocessors) {
  return 2 * sequence_heads <= multiprocessors;
}

/// Tokens of the spans that the scan cuts sequences into, 0 if it does not. A sequence of `spans`
/// spans takes 4 spans - 6 blocks in the first pass; both passes together cover it twice, so that
/// less than three spans gain nothing. Lengths are known to the device alone: the mean decides.
inline int scan_span_tokens(const GatedDeltaRuleProblem& p, int multiprocessors) {
  constexpr int64_t kLeastChunks = 8;  // of a span: below, launches outweigh it
  if (p.N == 0) return 0;
  const int64_t mean_length = p.B * p.T / p.N;
  for (int64_t spans = multiprocessors; spans >= 3; --spans) {
    if (p.N * p.HV * (kSpanBlocks * spans - 6) > multiprocessors) continue;
    const int64_t chunks = (mean_length + kChunk * spans - 1) / (kChunk * spans);
    if (chunks >= kLeastChunks) return static_cast<int>(chunks) * kChunk;
  }
  return 0;
}

/// Arrays in scratch memory, each 128 bytes or a multiple.
struct ScratchLayout {
  int span_tokens;
  int64_t chunks, spans;  // times value heads, at most

  ScratchLayout(const GatedDeltaRuleProblem& p, int multiprocessors)
      : span_tokens(scan_span_tokens(p, multiprocessors)),
        chunks(most_pieces(p, kChunk) * p.HV),
        spans(span_tokens > 0 ? most_pieces(p, span_tokens) * p.HV : 0) {}

  size_t bytes() const {
    return static_cast<size_t>(chunks * kScratchBytes) +
           static_cast<size_t>(2 * spans * kStateSize) * sizeof(float);
  }
};

inline BackwardArguments backward_arguments(const GatedDeltaRuleBackward& p, void* scratch) {
  BackwardArguments arguments{};
  set_problem(p, arguments);
  arguments.d_o = tensor_map(p, p.d_o, p.HV, p.V);
  arguments.d_v = tensor_map(p, p.d_v, p.HV, p.V);
  arguments.d_o_view = p.d_o;
  arguments.d_q = p.d_q;
  arguments.d_k = p.d_k;
  arguments.d_v_view = p.d_v;
  arguments.d_g = static_cast<float*>(p.d_g);
  arguments.d_beta = static_cast<float*>(p.d_beta);
  arguments.segment_states = p.segment_states;
  arguments.d_final_state = static_cast<const float*>(p.d_final_state);
  arguments.d_initial_state = static_cast<float*>(p.d_initial_state);
  const ScratchLayout layout(p, multiprocessors());
  arguments.s = static_cast<uint8_t*>(scratch);
  arguments.d_s = arguments.s + layout.chunks * kStateBytes;
  arguments.matrices = arguments.d_s + layout.chunks * kStateBytes;
  arguments.u = arguments.matrices + layout.chunks * kMatricesBytes;
  arguments.span_tokens = layout.span_tokens;
  arguments.span_starts = reinterpret_cast<float*>(arguments.u + layout.chunks * kWritesBytes);
  arguments.span_transitions = arguments.span_starts + layout.spans * kStateSize;
  return arguments;
}

template <typename Element>
void launch_replay(const GatedDeltaRuleBackward& p, const BackwardArguments& arguments,
                   Stream stream) {
  const int64_t segments = most_pieces(p, kSegmentTokens);
  if (segments == 0) return;
  launch(gated_delta_rule_replay_kernel<Element>, arguments, segments * p.HV, kThreads,
         sizeof(ReplayShared), "gated_delta_rule_backward_sm90: replay", stream);
}

template <typename Element>
void launch_scan(const GatedDeltaRuleBackward& p, const BackwardArguments& arguments,
                 Stream stream) {
  constexpr const char* kName = "gated_delta_rule_backward_sm90: scan";
  const auto one_half = gated_delta_rule_scan_kernel<Element, 1, Pass::kGradients>;
  if (arguments.span_tokens > 0) {
    const int64_t spans = most_pieces(p, arguments.span_tokens) * p.HV;
    launch(gated_delta_rule_scan_kernel<Element, 1, Pass::kSpans>, arguments, kSpanBlocks * spans,
           kScanThreads<1>, sizeof(ScanShared<1>), kName, stream);
    launch(gated_delta_rule_compose_kernel, arguments, kComposeBlocks * p.N * p.HV, kComposeThreads,
           0, kName, stream);
    launch(one_half, arguments, 2 * spans, kScanThreads<1>, sizeof(ScanShared<1>), kName, stream);
  } else if (scan_splits_v(p.N * p.HV, multiprocessors())) {
    launch(one_half, arguments, 2 * p.N * p.HV, kScanThreads<1>, sizeof(ScanShared<1>), kName,
           stream);
  } else {
    launch(gated_delta_rule_scan_kernel<Element, 2, Pass::kGradients>, arguments, p.N * p.HV,
           kScanThreads<2>, sizeof(ScanShared<2>), kName, stream);
  }
}

template <typename Element>
void launch_gradients(const GatedDeltaRuleBackward& p, const BackwardArguments& arguments,
                      Stream stream) {
  const int64_t blocks = std::min<int64_t>(most_pieces(p, kChunk) * p.H, multiprocessors());
  if (blocks == 0) return;
  launch(gated_delta_rule_gradients_kernel<Element>, arguments, blocks, kGradientThreads,
         sizeof(GradientShared), "gated_delta_rule_backward_sm90: gradients", stream);
}

template <typename Element>
void launch_backward(const GatedDeltaRuleBackward& p, const BackwardArguments& arguments,
                     Stream stream) {
  launch_replay<Element>(p, arguments, stream);
  launch_scan<Element>(p, arguments, stream);
  launch_gradients<Element>(p, arguments, stream);
}

}  // namespace gdn::kernels::cuda::sm90
