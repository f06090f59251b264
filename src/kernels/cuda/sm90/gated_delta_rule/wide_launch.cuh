// Arguments and launches of the kernels for wide heads.
#pragma once

#include <gdn/kernels/cuda/sm90/gated_delta_rule/launch.cuh>
#include <gdn/kernels/cuda/sm90/gated_delta_rule/wide_matrices.cuh>
#include <gdn/kernels/cuda/sm90/gated_delta_rule/wide_scan.cuh>

namespace gdn::kernels::cuda::sm90 {

inline void set_wide_problem(const GatedDeltaRuleProblem& p, void* matrices,
                             WideArguments& arguments) {
  set_problem(p, arguments);
  arguments.slices = wide_slices(p);
  arguments.matrices = static_cast<uint8_t*>(matrices);
}

inline WideForwardArguments wide_forward_arguments(const GatedDeltaRuleForward& p, void* matrices) {
  WideForwardArguments arguments{};
  set_wide_problem(p, matrices, arguments);
  arguments.o = tensor_map(p, p.o, p.HV, p.V);
  arguments.o_view = p.o;
  arguments.initial_state = static_cast<const float*>(p.initial_state);
  arguments.final_state = static_cast<float*>(p.final_state);
  arguments.segment_states = p.segment_states;
  return arguments;
}

/// T and P of all chunks, at most `chunks`, to arguments.matrices.
template <typename Element, Beta kBeta>
void launch_wide_matrices(const WideArguments& arguments, int64_t chunks, Stream stream) {
  if (chunks == 0) return;
  launch(gated_delta_rule_wide_matrices_kernel<Element, kBeta>, arguments, chunks * arguments.H,
         kWideMatricesThreads, sizeof(WideMatricesShared), "gated_delta_rule_sm90_wide: matrices",
         stream);
}

/// How a scan is spread over multiprocessors.
struct WideSchedule {
  int groups;   // slices of V a block, each with a warpgroup: 1 or 2
  int cluster;  // blocks of a cluster
};

/// For `heads` sequences (or segments) times value heads. One slice a block while that leaves no
/// block waiting for a multiprocessor, since two compete for the tensor cores. Two blocks a
/// cluster where a head has an even number of them: they halve what comes from L2. Four would leave
/// multiprocessors idle, whose number in a GPC need not be a multiple of four.
inline WideSchedule wide_schedule(int64_t heads, int slices, int multiprocessors) {
  const int groups = heads * slices <= multiprocessors ? 1 : 2;
  const int blocks = (slices + groups - 1) / groups;
  return {groups, blocks % 2 == 0 ? 2 : 1};
}

template <typename Arguments>
void launch_wide_scan(void (*kernel)(Arguments), const Arguments& arguments, int64_t heads,
                      const WideSchedule& schedule, size_t shared_bytes, const char* name,
                      Stream stream) {
  const int blocks = (arguments.slices + schedule.groups - 1) / schedule.groups;  // of a head
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(shared_bytes)),
        name);
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(schedule.cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = {static_cast<unsigned>(heads * blocks), 1, 1};
  config.blockDim = {static_cast<unsigned>(wide_threads(schedule.groups)), 1, 1};
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  check(cudaLaunchKernelEx(&config, kernel, arguments), name);
}

template <typename Element, int kGroups, int kTiles>
void launch_wide_forward_scan(const WideForwardArguments& arguments, int64_t heads,
                              const WideSchedule& schedule, Stream stream) {
  launch_wide_scan(gated_delta_rule_wide_forward_kernel<Element, kGroups, kTiles>, arguments, heads,
                   schedule, sizeof(WideShared<WidePass::kForward, kGroups, kTiles>),
                   "gated_delta_rule_forward_sm90_wide", stream);
}

/// O and the states, after launch_wide_matrices.
template <typename Element>
void launch_wide_forward_scan(const GatedDeltaRuleForward& p, const WideForwardArguments& arguments,
                              const WideSchedule& schedule, Stream stream) {
  const bool two_tiles = p.K <= 2 * kHalf;
  const auto launch = schedule.groups == 1 ? (two_tiles ? launch_wide_forward_scan<Element, 1, 2>
                                                        : launch_wide_forward_scan<Element, 1, 4>)
                                           : (two_tiles ? launch_wide_forward_scan<Element, 2, 2>
                                                        : launch_wide_forward_scan<Element, 2, 4>);
  launch(arguments, p.N * p.HV, schedule, stream);
}

template <typename Element>
void launch_wide_forward(const GatedDeltaRuleForward& p, const WideForwardArguments& arguments,
                         Stream stream) {
  launch_wide_matrices<Element, Beta::kOfRow>(arguments, most_pieces(p, kChunk), stream);
  launch_wide_forward_scan<Element>(
      p, arguments, wide_schedule(p.N * p.HV, arguments.slices, multiprocessors()), stream);
}

/// S and U^ of all chunks from the segment states, after launch_wide_matrices.
template <typename Element>
void launch_wide_replay_scan(const WideReplayArguments& arguments, int64_t heads,
                             const WideSchedule& schedule, Stream stream) {
  constexpr const char* kName = "gated_delta_rule_backward_sm90_wide: replay";
  if (schedule.groups == 1) {
    launch_wide_scan(gated_delta_rule_wide_replay_kernel<Element, 1>, arguments, heads, schedule,
                     sizeof(WideShared<WidePass::kReplay, 1, kWideKeyTiles>), kName, stream);
  } else {
    launch_wide_scan(gated_delta_rule_wide_replay_kernel<Element, 2>, arguments, heads, schedule,
                     sizeof(WideShared<WidePass::kReplay, 2, kWideKeyTiles>), kName, stream);
  }
}

/// T, P, S, U^ of all chunks and segments, at most so many, from the segment states.
template <typename Element>
void launch_wide_replay(const WideReplayArguments& arguments, int64_t chunks, int64_t segments,
                        Stream stream) {
  const int64_t heads = segments * arguments.HV;
  if (heads == 0) return;
  launch_wide_matrices<Element, Beta::kOfColumn>(arguments, chunks, stream);
  launch_wide_replay_scan<Element>(
      arguments, heads, wide_schedule(heads, arguments.slices, multiprocessors()), stream);
}

}  // namespace gdn::kernels::cuda::sm90
