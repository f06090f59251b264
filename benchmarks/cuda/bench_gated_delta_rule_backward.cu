// Time of the Hopper backward, and of its three kernels alone. dO is normal; the final state has no
// gradient, as in the published benchmarks. The forward's segment states are there beforehand, as
// after a training forward.
#include <algorithm>
#include <cstdio>
#include <string>
#include <vector>

#include <gdn/kernels/cuda/sm90/gated_delta_rule/forward_plan.h>
#include <gdn/kernels/cuda/sm90/gated_delta_rule/launch_backward.cuh>

#include "problem.cuh"

namespace {

using namespace gdn::benchmarks;

struct BackwardProblem : Problem {
  GatedDeltaRuleBackward b;
  void* scratch = nullptr;

  explicit BackwardProblem(const Shape& shape) : Problem(shape) {
    static_cast<GatedDeltaRuleProblem&>(b) = p;
    const int64_t T = p.T;
    auto* d_o = allocate<__nv_bfloat16>(T * p.HV * 128);
    auto* d_q = allocate<__nv_bfloat16>(T * p.H * 128);
    auto* d_k = allocate<__nv_bfloat16>(T * p.H * 128);
    auto* d_v = allocate<__nv_bfloat16>(T * p.HV * 128);
    auto* d_g = allocate<float>(T * p.HV);
    auto* d_beta = allocate<float>(T * p.HV);
    auto* segments =
        allocate<float>(sm90::most_pieces(p, kSegmentTokens) * p.HV * sm90::kStateSize);
    scratch = allocate<uint8_t>(
        static_cast<int64_t>(gdn::kernels::cuda::gated_delta_rule_backward_sm90_scratch(b)));
    for (void* pointer : {static_cast<void*>(d_o), static_cast<void*>(d_q), static_cast<void*>(d_k),
                          static_cast<void*>(d_v), static_cast<void*>(d_g),
                          static_cast<void*>(d_beta), static_cast<void*>(segments), scratch}) {
      memory.push_back(pointer);
    }
    fill_rows<<<T * p.HV, 128>>>(d_o, 7, false);
    p.segment_states = segments;
    sm90::run_forward(p, {}, nullptr, nullptr);
    check(cudaDeviceSynchronize(), "forward");
    b.segment_states = segments;
    b.d_o = {d_o, 0, p.HV * 128, 128};
    b.d_q = {d_q, 0, p.H * 128, 128};
    b.d_k = {d_k, 0, p.H * 128, 128};
    b.d_v = {d_v, 0, p.HV * 128, 128};
    b.d_g = d_g;
    b.d_beta = d_beta;
  }
};

}  // namespace

int main() {
  cudaDeviceProp device;
  check(cudaGetDeviceProperties(&device, 0), "device");
  std::printf("%s, %d multiprocessors\n", device.name, device.multiProcessorCount);
  // Published by FlashQLA, on an H200.
  std::vector<Shape> shapes;
  const auto add = [&](int H, int64_t tokens, std::vector<double> published) {
    for (size_t i = 0; i < published.size(); ++i) {
      const int64_t count = int64_t{1} << i;
      shapes.push_back({H, 2 * H, std::vector<int64_t>(static_cast<size_t>(count), tokens / count),
                        published[i]});
    }
  };
  add(16, 32768, {2.515, 2.581, 2.978, 2.893});
  add(16, 8192, {0.789, 0.870, 1.259, 0.759});
  add(4, 32768, {0.887, 0.889, 0.850, 0.841});
  add(4, 8192, {0.321, 0.377, 0.405, 0.395});
  std::printf("%-8s %-12s %9s %9s %7s %9s %9s %9s\n", "H/HV", "sequences", "ms", "published",
              "ratio", "replay", "scan", "gradients");
  double logarithms = 0;
  for (const Shape& shape : shapes) {
    const BackwardProblem problem(shape);
    const sm90::BackwardArguments arguments = sm90::backward_arguments(problem.b, problem.scratch);
    const double ms = time([&](cudaStream_t stream) {
      gdn::kernels::cuda::gated_delta_rule_backward_sm90(problem.b, problem.scratch, stream);
    });
    const double replay = time([&](cudaStream_t stream) {
      sm90::launch_replay<__nv_bfloat16>(problem.b, arguments, stream);
    });
    const double scan = time([&](cudaStream_t stream) {
      sm90::launch_scan<__nv_bfloat16>(problem.b, arguments, stream);
    });
    const double gradients = time([&](cudaStream_t stream) {
      sm90::launch_gradients<__nv_bfloat16>(problem.b, arguments, stream);
    });
    const double ratio = shape.best_published / ms;
    logarithms += std::log(ratio);
    const std::string name =
        std::to_string(shape.lengths.size()) + " x " + std::to_string(shape.lengths[0]);
    std::printf("%2d/%-5d %-12s %9.4f %9.3f %7.2f %9.4f %9.4f %9.4f\n", shape.H, shape.HV,
                name.c_str(), ms, shape.best_published, ratio, replay, scan, gradients);
  }
  std::printf("geometric mean %.2f\n", std::exp(logarithms / static_cast<double>(shapes.size())));
  return 0;
}
