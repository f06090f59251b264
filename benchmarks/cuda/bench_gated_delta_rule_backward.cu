// Time of the Hopper backward, and of its three kernels alone, for heads of 128 and for wide ones.
// dO is normal; the final state has no gradient, as in the published benchmarks. The forward's
// segment states are there beforehand, as after a training forward.
#include <algorithm>
#include <cstdio>
#include <string>
#include <vector>

#include <gdn/kernels/cuda/sm90/gated_delta_rule/forward_plan.h>
#include <gdn/kernels/cuda/sm90/gated_delta_rule/launch_backward.cuh>
#include <gdn/kernels/cuda/sm90/gated_delta_rule/wide_launch_backward.cuh>

#include "problem.cuh"

namespace {

using namespace gdn::benchmarks;

using Element = __nv_bfloat16;
namespace cuda = gdn::kernels::cuda;

size_t scratch_goal = 0;  // bytes; 0: what the operator takes

size_t goal(bool wide) {
  if (scratch_goal > 0) return scratch_goal;
  return wide ? cuda::kWideBackwardScratchGoal : cuda::kBackwardScratchGoal;
}

struct BackwardProblem : Problem {
  GatedDeltaRuleBackward b;
  bool wide;
  void* scratch = nullptr;

  explicit BackwardProblem(const Shape& shape) : Problem(shape) {
    static_cast<GatedDeltaRuleProblem&>(b) = p;
    wide = p.K != sm90::kHeadDim || p.V != sm90::kHeadDim;
    const int64_t T = p.T;
    const auto keep = [&](auto* array) {
      memory.push_back(array);
      return array;
    };
    auto* d_o = keep(allocate<Element>(T * p.HV * p.V));
    auto* segments = keep(allocate<float>(sm90::most_pieces(p, kSegmentTokens) * p.HV * p.K * p.V));
    fill_rows<<<T * p.HV, p.V>>>(d_o, 7, false);
    p.segment_states = segments;
    b.segment_states = segments;
    if (wide) {
      void* forward_scratch = keep(allocate<uint8_t>(
          static_cast<int64_t>(cuda::gated_delta_rule_forward_sm90_wide_scratch(p))));
      cuda::gated_delta_rule_forward_sm90_wide(p, forward_scratch, nullptr);
    } else {
      sm90::run_forward(p, {}, nullptr, nullptr);
    }
    check(cudaDeviceSynchronize(), "forward");
    b.d_o = {d_o, 0, p.HV * p.V, p.V};
    b.d_q = {keep(allocate<Element>(T * p.H * p.K)), 0, p.H * p.K, p.K};
    b.d_k = {keep(allocate<Element>(T * p.H * p.K)), 0, p.H * p.K, p.K};
    b.d_v = {keep(allocate<Element>(T * p.HV * p.V)), 0, p.HV * p.V, p.V};
    b.d_g = keep(allocate<float>(T * p.HV));
    b.d_beta = keep(allocate<float>(T * p.HV));
    const auto bytes = wide ? cuda::gated_delta_rule_backward_sm90_wide_scratch
                            : cuda::gated_delta_rule_backward_sm90_scratch;
    scratch = keep(allocate<uint8_t>(static_cast<int64_t>(bytes(b, longest, goal(wide)))));
  }
};

/// Milliseconds.
struct Times {
  double all, replay, scan, gradients;
};

/// Milliseconds of `launch` of all waves.
template <typename Backward, typename Launch>
double time_waves(const BackwardProblem& problem, const Launch& launch) {
  const Backward backward(problem.b, problem.longest, goal(problem.wide));
  return time([&](cudaStream_t stream) {
    backward.for_each(problem.scratch, [&](const auto& wave) { launch(wave, stream); });
  });
}

Times measure(const BackwardProblem& problem) {
  const auto time = [&](void (*launch)(const sm90::BackwardArguments&, cuda::Stream)) {
    return time_waves<sm90::NarrowBackward>(problem, launch);
  };
  return {time(sm90::launch_backward<Element>), time(sm90::launch_replay<Element>),
          time(sm90::launch_scan<Element>), time(sm90::launch_gradients<Element>)};
}

Times measure_wide(const BackwardProblem& problem) {
  const auto time = [&](void (*launch)(const sm90::WideBackwardArguments&, cuda::Stream)) {
    return time_waves<sm90::WideBackward>(problem, launch);
  };
  return {time(sm90::launch_wide_backward<Element>), time(sm90::launch_wide_replay<Element>),
          time(sm90::launch_wide_backward_scan<Element>),
          time(sm90::launch_wide_gradients<Element>)};
}

std::string sequences(const Shape& shape) {
  return std::to_string(shape.lengths.size()) + " x " + std::to_string(shape.lengths[0]);
}

void bench_wide() {
  const auto equal = [](size_t count, int64_t length) {
    return std::vector<int64_t>(count, length);
  };
  const std::vector<Shape> shapes = {
      {6, 6, equal(16, 2048), 0, 256, 512}, {6, 6, equal(4, 8192), 0, 256, 512},
      {6, 6, equal(1, 32768), 0, 256, 512}, {6, 6, equal(1, 2048), 0, 256, 512},
      {6, 6, equal(16, 2048), 0, 256, 256}, {8, 16, equal(8, 4096), 0, 192, 192},
  };
  std::printf("%-8s %-8s %-12s %9s %9s %9s %9s\n", "H/HV", "K/V", "sequences", "ms", "replay",
              "scan", "gradients");
  for (const Shape& shape : shapes) {
    const Times times = measure_wide(BackwardProblem(shape));
    const std::string sizes = std::to_string(shape.K) + "/" + std::to_string(shape.V);
    std::printf("%2d/%-5d %-8s %-12s %9.4f %9.4f %9.4f %9.4f\n", shape.H, shape.HV, sizes.c_str(),
                sequences(shape).c_str(), times.all, times.replay, times.scan, times.gradients);
  }
}

}  // namespace

/// An argument is a goal for scratch memory in MiB.
int main(int count, char** arguments) {
  if (count > 1) scratch_goal = std::stoull(arguments[1]) << 20;
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
    const Times times = measure(BackwardProblem(shape));
    const double ratio = shape.best_published / times.all;
    logarithms += std::log(ratio);
    std::printf("%2d/%-5d %-12s %9.4f %9.3f %7.2f %9.4f %9.4f %9.4f\n", shape.H, shape.HV,
                sequences(shape).c_str(), times.all, shape.best_published, ratio, times.replay,
                times.scan, times.gradients);
  }
  std::printf("geometric mean %.2f\n", std::exp(logarithms / static_cast<double>(shapes.size())));
  bench_wide();
  return 0;
}
