// Time of the Hopper forward of wide heads, of its two kernels, and of the backward's replay.
#include <cstdio>
#include <string>
#include <vector>

#include <gdn/kernels/cuda/sm90/gated_delta_rule/wide_launch.cuh>

#include "problem.cuh"

namespace {

using namespace gdn::benchmarks;
using Element = __nv_bfloat16;

struct Times {
  double forward, matrices, scan, replay;
};

Times measure(const Problem& problem) {
  const GatedDeltaRuleForward& p = problem.p;
  const int64_t entries = sm90::wide_entries(p);
  const int slices = sm90::wide_slices(p);
  auto* matrices = allocate<uint8_t>(entries * sm90::kWideMatricesBytes);
  const sm90::WideForwardArguments forward = sm90::wide_forward_arguments(p, matrices);
  Times times{};
  times.forward =
      time([&](cudaStream_t stream) { sm90::launch_wide_forward<Element>(p, forward, stream); });
  times.matrices = time([&](cudaStream_t stream) {
    sm90::launch_wide_matrices<Element, sm90::Beta::kOfRow>(
        forward, sm90::most_pieces(p, sm90::kChunk), stream);
  });
  const int multiprocessors = sm90::multiprocessors();
  const sm90::WideSchedule schedule = sm90::wide_schedule(p.N * p.HV, slices, multiprocessors);
  times.scan = time([&](cudaStream_t stream) {
    sm90::launch_wide_forward_scan<Element>(p, forward, schedule, stream);
  });

  const int64_t segments = sm90::most_pieces(p, kSegmentTokens);
  const int64_t segment_heads = segments * p.HV;
  auto* segment_states = allocate<float>(segment_heads * p.K * p.V);
  check(cudaMemset(segment_states, 0, segment_heads * p.K * p.V * sizeof(float)), "states");
  sm90::WideReplayArguments replay{};
  sm90::set_wide_problem(p, matrices, replay);
  replay.segment_states = segment_states;
  replay.s = allocate<uint8_t>(entries * slices * sm90::kWideStateBytes);
  replay.u = allocate<uint8_t>(entries * slices * sm90::kWideWritesBytes);
  times.replay = time([&](cudaStream_t stream) {
    sm90::launch_wide_replay<Element>(replay, sm90::most_pieces(p, sm90::kChunk), segments, stream);
  });
  for (void* memory : {static_cast<void*>(matrices), static_cast<void*>(segment_states),
                       static_cast<void*>(replay.s), static_cast<void*>(replay.u)}) {
    cudaFree(memory);
  }
  return times;
}

}  // namespace

int main() {
  cudaDeviceProp device;
  check(cudaGetDeviceProperties(&device, 0), "device");
  std::printf("%s, %d multiprocessors\n", device.name, device.multiProcessorCount);
  const auto sequences = [](int count, int64_t length) {
    return std::vector<int64_t>(static_cast<size_t>(count), length);
  };
  const std::vector<Shape> shapes = {
      {6, 6, sequences(16, 2048), 0, 256, 512},  {6, 6, sequences(4, 8192), 0, 256, 512},
      {6, 6, sequences(1, 32768), 0, 256, 512},  {6, 6, sequences(1, 2048), 0, 256, 512},
      {6, 6, sequences(16, 2048), 0, 256, 256},  {8, 16, sequences(8, 4096), 0, 192, 192},
      {16, 32, sequences(4, 8192), 0, 128, 256},
  };
  std::printf("%-8s %-8s %-10s %9s %9s %9s %9s\n", "H/HV", "K/V", "sequences", "forward ms",
              "matrices", "scan", "replay");
  for (const Shape& shape : shapes) {
    const Times times = measure(Problem(shape));
    const std::string heads = std::to_string(shape.H) + "/" + std::to_string(shape.HV);
    const std::string sizes = std::to_string(shape.K) + "/" + std::to_string(shape.V);
    const std::string name =
        std::to_string(shape.lengths.size()) + " x " + std::to_string(shape.lengths[0]);
    std::printf("%-8s %-8s %-10s %9.4f %9.4f %9.4f %9.4f\n", heads.c_str(), sizes.c_str(),
                name.c_str(), times.forward, times.matrices, times.scan, times.replay);
    std::fflush(stdout);
  }
  return 0;
}
