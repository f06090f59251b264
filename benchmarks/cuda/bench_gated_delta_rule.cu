// Time of the Hopper forward beside the best published, and of its roles alone; with the argument
// `spans`, of its several kernels in divisions of every kind, from which the plan's constants are.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

#include <gdn/kernels/cuda/sm90/gated_delta_rule/launch_split.cuh>

#include "problem.cuh"

namespace {

using namespace gdn::benchmarks;

/// Every shape of the published tables (docs/hopper.md names them), and the best of their times.
std::vector<Shape> published_shapes() {
  const auto repeat = [](size_t count, int64_t length) {
    return std::vector<int64_t>(count, length);
  };
  return {
      {2, 8, repeat(1, 32768), 0.242},   {2, 8, repeat(1, 8192), 0.116},
      {2, 8, repeat(1, 2048), 0.061},    {2, 8, repeat(2, 16384), 0.238},
      {2, 8, {4096, 28672}, 0.245},      {2, 8, repeat(4, 8192), 0.269},
      {2, 8, repeat(8, 4096), 0.186},    {2, 8, repeat(4, 2048), 0.105},
      {2, 8, repeat(8, 1024), 0.053},    {8, 32, repeat(1, 32768), 0.885},
      {8, 32, repeat(1, 8192), 0.280},   {8, 32, repeat(1, 2048), 0.106},
      {8, 32, repeat(2, 16384), 0.773},  {8, 32, {4096, 28672}, 0.879},
      {8, 32, repeat(4, 8192), 0.419},   {8, 32, repeat(8, 4096), 0.424},
      {8, 32, repeat(4, 2048), 0.108},   {8, 32, repeat(8, 1024), 0.117},
      {16, 64, repeat(1, 32768), 1.389}, {16, 64, repeat(1, 8192), 0.370},
      {16, 64, repeat(1, 2048), 0.100},  {16, 64, repeat(2, 16384), 0.793},
      {16, 64, {4096, 28672}, 1.339},    {16, 64, repeat(4, 8192), 0.742},
      {16, 64, repeat(8, 4096), 0.753},  {16, 64, repeat(4, 2048), 0.220},
      {16, 64, repeat(8, 1024), 0.208},  {16, 32, repeat(1, 32768), 0.744},
      {16, 32, repeat(1, 8192), 0.237},  {16, 32, repeat(1, 2048), 0.099},
      {16, 32, repeat(2, 16384), 0.738}, {16, 32, {4096, 28672}, 0.845},
      {16, 32, repeat(4, 8192), 0.375},  {16, 32, repeat(8, 4096), 0.381},
      {16, 32, repeat(4, 2048), 0.111},  {16, 32, repeat(8, 1024), 0.110},
  };
}

struct Measured {
  Shape shape;
  sm90::ForwardPlan plan;
  double ms, expected_ms;
  double ratio() const { return shape.best_published / ms; }
};

double time_plan(const Problem& problem, const sm90::ForwardPlan& plan) {
  const Scratch scratch(sm90::forward_scratch(problem.p, plan));
  return time(
      [&](cudaStream_t stream) { sm90::run_forward(problem.p, plan, scratch.data, stream); });
}

Measured measure(const Shape& shape) {
  const Problem problem(shape);
  const auto plan = sm90::plan_forward(problem.p, problem.longest, sm90::multiprocessors());
  const double expected =
      sm90::ForwardCost(problem.p, problem.longest, sm90::multiprocessors()).of(plan) * 1e-3;
  return {shape, plan, time_plan(problem, plan), expected};
}

void print(const Measured& measured) {
  std::string lengths;
  for (const int64_t length : measured.shape.lengths) {
    lengths += (lengths.empty() ? "" : "+") + std::to_string(length);
  }
  const sm90::ForwardPlan& plan = measured.plan;
  const std::string division =
      !plan.split ? "one kernel"
                  : std::to_string(plan.span_chunks) + ", " + std::to_string(plan.end_halves) +
                        ", " + (plan.fused_outputs ? "fused" : std::to_string(plan.output_halves));
  std::printf("%2d/%-2d %-40s %9.4f %9.3f %7.2f %9.4f  %s\n", measured.shape.H, measured.shape.HV,
              lengths.c_str(), measured.ms, measured.shape.best_published, measured.ratio(),
              measured.expected_ms, division.c_str());
}

/// Milliseconds of the roles that are given, the others idle.
template <sm90::Roles kRoles>
double time_roles(const GatedDeltaRuleForward& p) {
  const sm90::ForwardArguments arguments = sm90::forward_arguments(p);
  return time(
      [&](cudaStream_t stream) { sm90::launch_forward<__nv_bfloat16, kRoles>(arguments, stream); });
}

/// Milliseconds of the several kernels, each alone.
struct KernelTimes {
  double matrices, inverses, compose, fused;
  double ends[2], outputs[2];  // with one half of V a block, with both
};

KernelTimes time_kernels(const Problem& problem, sm90::ForwardPlan plan) {
  using Element = __nv_bfloat16;
  const Scratch scratch(sm90::forward_scratch(problem.p, plan));
  const sm90::SplitArguments arguments = sm90::split_arguments(problem.p, plan, scratch.data);
  const auto matrices = [&](cudaStream_t stream) {
    sm90::launch_matrices<Element>(problem.p, plan, arguments, stream);
  };
  KernelTimes times;
  times.matrices = time(matrices);
  for (const int halves : {1, 2}) {
    plan.end_halves = plan.output_halves = halves;
    times.ends[halves - 1] = time([&](cudaStream_t stream) {
      sm90::launch_scan<Element, sm90::Scan::kEnd>(problem.p, plan, arguments, stream);
    });
    times.outputs[halves - 1] = time([&](cudaStream_t stream) {
      sm90::launch_scan<Element, sm90::Scan::kOutputs>(problem.p, plan, arguments, stream);
    });
  }
  times.compose =
      time([&](cudaStream_t stream) { sm90::launch_compose(problem.p, arguments, stream); });
  plan.fused_outputs = true;
  times.inverses = time(matrices);
  times.fused = time([&](cudaStream_t stream) {
    sm90::launch_fused_outputs<Element>(problem.p, plan, arguments, stream);
  });
  return times;
}

/// For the plan's constants: every shape for which spans come near the plan of least expected time,
/// in several numbers of spans: the kernels alone, and the best plans that these make.
void sweep_spans(const Shape& shape) {
  const Problem problem(shape);
  const int count = sm90::multiprocessors();
  const sm90::ForwardCost cost(problem.p, problem.longest, count);
  sm90::ForwardPlan plan = sm90::plan_forward(problem.p, problem.longest, count);
  const double least = cost.of(plan);
  plan.split = true;
  std::string lengths;
  for (const int64_t length : shape.lengths) {
    lengths += (lengths.empty() ? "" : "+") + std::to_string(length);
  }
  bool first = true;
  for (const int64_t spans : {2, 3, 4, 5, 6, 8, 10, 12, 16, 24}) {
    constexpr double kNear = 1.3;
    if (spans * 4 > cost.longest_chunks()) break;
    plan.span_chunks = (cost.longest_chunks() + spans - 1) / spans;
    const auto expected = [&](bool fused) {
      sm90::ForwardPlan with = plan;
      with.fused_outputs = fused;
      double time = 1e9;
      for (with.end_halves = 1; with.end_halves <= 2; ++with.end_halves) {
        for (with.output_halves = 1; with.output_halves <= 2; ++with.output_halves) {
          time = std::min(time, cost.of(with));
        }
      }
      return time;
    };
    if (std::min(expected(false), expected(true)) > kNear * least) continue;
    if (first) {
      std::printf("%2d/%-2d %s: one kernel %.4f", shape.H, shape.HV, lengths.c_str(),
                  time_plan(problem, {}));
      for (const int halves : {1, 2}) {
        std::printf(", without spans %d: %.4f", halves,
                    time_plan(problem, {.split = true,
                                        .output_halves = halves,
                                        .matrix_chunks = plan.matrix_chunks}));
      }
      std::printf("\n");
      first = false;
    }
    plan.fused_outputs = false;
    const KernelTimes alone = time_kernels(problem, plan);
    plan.end_halves = alone.ends[0] < alone.ends[1] ? 1 : 2;
    plan.output_halves = alone.outputs[0] < alone.outputs[1] ? 1 : 2;
    const double apart = time_plan(problem, plan);
    plan.fused_outputs = true;
    const double fused = time_plan(problem, plan);
    std::printf(
        "%3d spans of %3d: matrices %.4f, T %.4f, ends %.4f %.4f, compose %.4f, outputs %.4f %.4f, "
        "fused %.4f; best %d %d %.4f (%.4f), %d fused %.4f (%.4f)\n",
        static_cast<int>(spans), static_cast<int>(plan.span_chunks), alone.matrices, alone.inverses,
        alone.ends[0], alone.ends[1], alone.compose, alone.outputs[0], alone.outputs[1],
        alone.fused, plan.end_halves, plan.output_halves, apart, expected(false) * 1e-3,
        plan.end_halves, fused, expected(true) * 1e-3);
  }
}

}  // namespace

int main(int argc, char** argv) {
  cudaDeviceProp device;
  check(cudaGetDeviceProperties(&device, 0), "device");
  std::printf("%s, %d multiprocessors\n", device.name, device.multiProcessorCount);
  if (argc > 1 && std::string(argv[1]) == "spans") {
    for (const Shape& shape : published_shapes()) sweep_spans(shape);
    return 0;
  }
  std::vector<Measured> all;
  for (const Shape& shape : published_shapes()) all.push_back(measure(shape));
  std::sort(all.begin(), all.end(),
            [](const Measured& a, const Measured& b) { return a.ratio() < b.ratio(); });
  std::printf("%-5s %-40s %9s %9s %7s %9s  %s\n", "H/HV", "sequences", "ms", "published", "ratio",
              "expected", "chunks of a span; halves of V a block: ends, outputs");
  double logarithms = 0;
  for (const Measured& measured : all) {
    print(measured);
    logarithms += std::log(measured.ratio());
  }
  std::printf("geometric mean of the ratios %.3f\n",
              std::exp(logarithms / static_cast<double>(all.size())));
  std::printf(
      "roles alone, microseconds per chunk (16/64, 2 x 8192: one block a multiprocessor)\n");
  const Problem problem({16, 64, {8192, 8192}, 0});
  std::printf("all %.3f, matrices %.3f, state %.3f\n",
              1e3 / 128 * time_roles<sm90::Roles::kAll>(problem.p),
              1e3 / 128 * time_roles<sm90::Roles::kMatricesOnly>(problem.p),
              1e3 / 128 * time_roles<sm90::Roles::kStateOnly>(problem.p));
  return 0;
}
