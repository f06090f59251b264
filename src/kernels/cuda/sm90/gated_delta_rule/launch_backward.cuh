// Arguments, scratch memory and launches of the Hopper backward.
#pragma once

#include <algorithm>

#include <gdn/kernels/cuda/sm90/gated_delta_rule/backward_gradients.cuh>
#include <gdn/kernels/cuda/sm90/gated_delta_rule/backward_replay.cuh>
#include <gdn/kernels/cuda/sm90/gated_delta_rule/backward_scan.cuh>
#include <gdn/kernels/cuda/sm90/gated_delta_rule/launch.cuh>

namespace gdn::kernels::cuda::sm90 {

/// At most so many pieces of `tokens` tokens have all sequences together; their lengths are known
/// to the device alone.
inline int64_t most_pieces(const GatedDeltaRuleProblem& p, int64_t tokens) {
  return p.cu_seqlens != nullptr ? p.T / tokens + p.N : p.N * ((p.T + tokens - 1) / tokens);
}

/// Whether the scan gives each half of V a block of its own: while that leaves no block waiting for
/// a multiprocessor, a half of the products a chunk is the shorter chain.
inline bool scan_splits_v(int64_t sequence_heads, int multiprocessors) {
  return 2 * sequence_heads <= multiprocessors;
}

inline BackwardArguments backward_arguments(const GatedDeltaRuleBackward& p, void* scratch) {
  BackwardArguments arguments{};
  set_problem(p, arguments);
  arguments.d_o = tensor_map(p, p.d_o, p.HV);
  arguments.d_v = tensor_map(p, p.d_v, p.HV);
  arguments.d_o_view = p.d_o;
  arguments.d_q = p.d_q;
  arguments.d_k = p.d_k;
  arguments.d_v_view = p.d_v;
  arguments.d_g = static_cast<float*>(p.d_g);
  arguments.d_beta = static_cast<float*>(p.d_beta);
  arguments.segment_states = p.segment_states;
  arguments.d_final_state = static_cast<const float*>(p.d_final_state);
  arguments.d_initial_state = static_cast<float*>(p.d_initial_state);
  const int64_t entries = most_pieces(p, kChunk) * p.HV;
  arguments.s = static_cast<uint8_t*>(scratch);
  arguments.d_s = arguments.s + entries * kStateBytes;
  arguments.matrices = arguments.d_s + entries * kStateBytes;
  arguments.u = arguments.matrices + entries * kMatricesBytes;
  return arguments;
}

inline int multiprocessors() {
  int device = 0;
  int count = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device),
        "cudaDeviceGetAttribute");
  return count;
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
  if (scan_splits_v(p.N * p.HV, multiprocessors())) {
    launch(gated_delta_rule_scan_kernel<Element, 1>, arguments, 2 * p.N * p.HV, kScanThreads<1>,
           sizeof(ScanShared<1>), kName, stream);
  } else {
    launch(gated_delta_rule_scan_kernel<Element, 2>, arguments, p.N * p.HV, kScanThreads<2>,
           sizeof(ScanShared<2>), kName, stream);
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
