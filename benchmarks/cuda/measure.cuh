// Random numbers on a GPU, and the time of what is queued there.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cuda_runtime.h>
#include <vector>

namespace gdn::benchmarks {

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::printf("%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

inline __device__ float uniform(uint64_t index, uint64_t seed) {
  uint64_t x = index * 0x9e3779b97f4a7c15ULL + seed * 0xbf58476d1ce4e5b9ULL;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
  return (static_cast<float>((x ^ (x >> 31)) >> 40) + 0.5F) / 16777216.0F;
}

inline __device__ float normal(uint64_t index, uint64_t seed) {
  return sqrtf(-2 * logf(uniform(2 * index, seed))) * cospif(2 * uniform(2 * index + 1, seed));
}

/// Median milliseconds of graph replays.
template <typename Body>
double time(const Body& body) {
  cudaStream_t stream;
  check(cudaStreamCreate(&stream), "stream");
  body(stream);
  check(cudaStreamSynchronize(stream), "warm-up");
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
  body(stream);
  check(cudaStreamEndCapture(stream, &graph), "capture");
  check(cudaGraphInstantiate(&exec, graph, 0), "instantiate");
  constexpr int kRepeats = 31;
  std::vector<cudaEvent_t> events(kRepeats + 1);
  for (auto& event : events) check(cudaEventCreate(&event), "event");
  for (int warm = 0; warm < 10; ++warm) check(cudaGraphLaunch(exec, stream), "replay");
  for (int i = 0; i < kRepeats; ++i) {
    check(cudaEventRecord(events[i], stream), "record");
    check(cudaGraphLaunch(exec, stream), "replay");
  }
  check(cudaEventRecord(events[kRepeats], stream), "record");
  check(cudaStreamSynchronize(stream), "replay");
  std::vector<float> times(kRepeats);
  for (int i = 0; i < kRepeats; ++i) {
    check(cudaEventElapsedTime(&times[i], events[i], events[i + 1]), "elapsed");
  }
  std::nth_element(times.begin(), times.begin() + kRepeats / 2, times.end());
  for (auto& event : events) cudaEventDestroy(event);
  cudaGraphExecDestroy(exec);
  cudaGraphDestroy(graph);
  cudaStreamDestroy(stream);
  return times[kRepeats / 2];
}

}  // namespace gdn::benchmarks
