// Time of the Hopper forward, and of its roles alone.
#include <algorithm>
#include <cstdio>
#include <string>
#include <vector>

#include "problem.cuh"

namespace {

using namespace gdn::benchmarks;

/// Milliseconds of the roles that are given, the others idle.
template <sm90::Roles kRoles>
double time_roles(const GatedDeltaRuleForward& p) {
  const sm90::ForwardArguments arguments = sm90::forward_arguments(p);
  return time([&](cudaStream_t stream) {
    sm90::launch_forward<__nv_bfloat16, kRoles>(arguments, p.N * p.HV, stream);
  });
}

}  // namespace

int main() {
  cudaDeviceProp device;
  check(cudaGetDeviceProperties(&device, 0), "device");
  std::printf("%s, %d multiprocessors\n", device.name, device.multiProcessorCount);
  const std::vector<Shape> shapes = {
      {16, 64, {8192, 8192, 8192, 8192}, 0.742},
      {16, 64, {4096, 4096, 4096, 4096, 4096, 4096, 4096, 4096}, 0.753},
      {16, 64, {1024, 1024, 1024, 1024, 1024, 1024, 1024, 1024}, 0.208},
      {16, 64, {16384, 16384}, 0.793},
      {16, 64, {32768}, 1.389},
      {16, 64, {8192}, 0.370},
      {16, 64, {2048}, 0.100},
      {16, 64, {4096, 28672}, 1.339},
      {16, 64, {2048, 2048, 2048, 2048}, 0.220},
      {16, 32, {8192, 8192, 8192, 8192}, 0.375},
      {16, 32, {4096, 4096, 4096, 4096, 4096, 4096, 4096, 4096}, 0.381},
      {16, 32, {2048, 2048, 2048, 2048}, 0.111},
      {16, 32, {1024, 1024, 1024, 1024, 1024, 1024, 1024, 1024}, 0.110},
      {16, 32, {32768}, 0.744},
      {8, 32, {8192, 8192, 8192, 8192}, 0.419},
      {8, 32, {2048, 2048, 2048, 2048}, 0.108},
      {2, 8, {4096, 4096, 4096, 4096, 4096, 4096, 4096, 4096}, 0.186},
      {2, 8, {1024, 1024, 1024, 1024, 1024, 1024, 1024, 1024}, 0.053},
      {2, 8, {8192}, 0.116},
  };
  std::printf("%-8s %-22s %9s %9s %7s %12s\n", "H/HV", "sequences", "ms", "published", "ratio",
              "us per chunk");
  for (const Shape& shape : shapes) {
    const Problem problem(shape);
    const double ms = time([&](cudaStream_t stream) {
      gdn::kernels::cuda::gated_delta_rule_forward_sm90(problem.p, stream);
    });
    const int64_t blocks = problem.p.N * problem.p.HV;
    const int64_t waves = (blocks + device.multiProcessorCount - 1) / device.multiProcessorCount;
    const int64_t longest = *std::max_element(shape.lengths.begin(), shape.lengths.end());
    std::string name = std::to_string(shape.lengths.size()) + " x " + std::to_string(longest);
    std::printf("%2d/%-5d %-22s %9.4f %9.3f %7.2f %12.3f\n", shape.H, shape.HV, name.c_str(), ms,
                shape.best_published, shape.best_published / ms,
                1e3 * ms / static_cast<double>(waves * (longest / 64)));
  }
  std::printf(
      "roles alone, microseconds per chunk (16/64, 2 x 8192: one block a multiprocessor)\n");
  const Problem problem({16, 64, {8192, 8192}, 0});
  std::printf("all %.3f, matrices %.3f, state %.3f\n",
              1e3 / 128 * time_roles<sm90::Roles::kAll>(problem.p),
              1e3 / 128 * time_roles<sm90::Roles::kMatricesOnly>(problem.p),
              1e3 / 128 * time_roles<sm90::Roles::kStateOnly>(problem.p));
  return 0;
}
