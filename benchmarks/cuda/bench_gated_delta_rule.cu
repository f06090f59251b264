// Time of the Hopper forward beside the best published, and of its roles alone; with the argument
// `plans`, of every plan that comes near the best and of its kernels, for the plan's constants.
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

std::string describe(const Shape& shape) {
  std::string lengths;
  for (const int64_t length : shape.lengths) {
    lengths += (lengths.empty() ? "" : "+") + std::to_string(length);
  }
  return lengths;
}

/// Chunks of a span, and those of the first if outputs are fused; or halves of V a block.
std::string describe(const sm90::ForwardPlan& plan) {
  if (!plan.split) return "one kernel";
  const std::string span = std::to_string(plan.span_chunks) + ", ";
  return plan.fused_outputs
             ? span + "first " + std::to_string(plan.span_chunks + plan.lead_chunks)
             : span + std::to_string(plan.end_halves) + ", " + std::to_string(plan.output_halves);
}

void print(const Measured& measured) {
  std::printf("%2d/%-2d %-40s %9.4f %9.3f %7.2f %9.4f  %s\n", measured.shape.H, measured.shape.HV,
              describe(measured.shape).c_str(), measured.ms, measured.shape.best_published,
              measured.ratio(), measured.expected_ms, describe(measured.plan).c_str());
}

/// Milliseconds of the roles that are given, the others idle.
template <sm90::Roles kRoles>
double time_roles(const GatedDeltaRuleForward& p) {
  const sm90::ForwardArguments arguments = sm90::forward_arguments(p);
  return time(
      [&](cudaStream_t stream) { sm90::launch_forward<__nv_bfloat16, kRoles>(arguments, stream); });
}

/// Milliseconds of the kernels of a plan, each alone, and of the whole.
void print_kernels(const Problem& problem, const sm90::ForwardPlan& plan, double expected) {
  using Element = __nv_bfloat16;
  const Scratch scratch(sm90::forward_scratch(problem.p, plan));
  const sm90::SplitArguments arguments = sm90::split_arguments(problem.p, plan, scratch.data);
  const double whole = time_plan(problem, plan);
  const double matrices = time([&](cudaStream_t stream) {
    sm90::launch_matrices<Element>(problem.p, plan, arguments, stream);
  });
  const double compose =
      time([&](cudaStream_t stream) { sm90::launch_compose(problem.p, arguments, stream); });
  const double ends = time([&](cudaStream_t stream) {
    plan.fused_outputs
        ? sm90::launch_first_pass<Element>(problem.p, plan, arguments, stream)
        : sm90::launch_scan<Element, sm90::Scan::kEnd>(problem.p, plan, arguments, stream);
  });
  const double outputs = time([&](cudaStream_t stream) {
    plan.fused_outputs
        ? sm90::launch_later_outputs<Element>(problem.p, plan, arguments, stream)
        : sm90::launch_scan<Element, sm90::Scan::kOutputs>(problem.p, plan, arguments, stream);
  });
  std::printf("  %-16s %.4f expected %.4f, matrices %.4f, first pass %.4f, compose %.4f, "
              "outputs %.4f\n",
              describe(plan).c_str(), whole, expected * 1e-3, matrices, ends, compose, outputs);
}

/// For the plan's constants: every kind of plan that comes near the one of least expected time.
void sweep_plans(const Shape& shape) {
  constexpr double kNear = 1.25;
  const Problem problem(shape);
  const int count = sm90::multiprocessors();
  const sm90::ForwardCost cost(problem.p, problem.longest, count);
  const double least = cost.of(sm90::plan_forward(problem.p, problem.longest, count));
  std::printf("%2d/%-2d %s\n", shape.H, shape.HV, describe(shape).c_str());
  sm90::for_each_plan(cost, [&](const sm90::ForwardPlan& plan) {
    const double expected = cost.of(plan);
    if (expected > kNear * least) return;
    if (plan.split) {
      print_kernels(problem, plan, expected);
    } else {
      std::printf("  one kernel %.4f expected %.4f\n", time_plan(problem, plan), expected * 1e-3);
    }
  });
}

}  // namespace

int main(int argc, char** argv) {
  cudaDeviceProp device;
  check(cudaGetDeviceProperties(&device, 0), "device");
  std::printf("%s, %d multiprocessors\n", device.name, device.multiProcessorCount);
  if (argc > 1 && std::string(argv[1]) == "plans") {
    for (const Shape& shape : published_shapes()) sweep_plans(shape);
    return 0;
  }
  std::vector<Measured> all;
  for (const Shape& shape : published_shapes()) all.push_back(measure(shape));
  std::sort(all.begin(), all.end(),
            [](const Measured& a, const Measured& b) { return a.ratio() < b.ratio(); });
  std::printf("%-5s %-40s %9s %9s %7s %9s  %s\n", "H/HV", "sequences", "ms", "published", "ratio",
              "expected", "chunks of a span, of the first; or halves of V a block: ends, outputs");
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
