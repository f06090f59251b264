// The SIMD kernels of the gated delta rule against the reference in fp64, at random shapes, under
// every instruction set. The bound is argued, not picked: our error against fp64 may be twice that
// of the plain loops computed in fp32, which round inputs and outputs to the same dtype.

#include <cmath>
#include <limits>
#include <random>
#include <support/gated_delta_rule_case.h>
#include <support/kernel.h>
#include <support/targets.h>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

#include <gdn/kernels/cpu/column_slices.h>
#include <gdn/kernels/cpu/gated_delta_rule.h>
#include <gdn/kernels/reference/gated_delta_rule.h>
#include <gdn/kernels/shares.h>

namespace gdn::test {
namespace {

namespace cpu = kernels::cpu;
namespace reference = kernels::reference;
using Case = GatedDeltaRuleCase;

/// Two threads with ranges of several heads, whose workspace one uses after another.
void two_uneven_ranges(int64_t count, kernels::FunctionRef<void(int64_t, int64_t)> body) {
  const int64_t cut = count / 3;
  std::thread other([&] { body(0, cut); });
  body(cut, count);
  other.join();
}

/// As many threads as tasks: each task then has one value head, where fewer threads share a key
/// head's scores between several.
void forward_for_many_threads(const kernels::GatedDeltaRuleForward& problem) {
  kernels::GatedDeltaRuleForward p = problem;
  p.threads = p.N * p.HV;
  cpu::chunk_gated_delta_rule(p);
}

/// `kThreads` threads, as torch's pool shares work between them.
template <int64_t kThreads>
void on_threads(int64_t count, kernels::FunctionRef<void(int64_t, int64_t)> body) {
  kernels::Shares shares(count, kThreads);
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < kThreads; ++i) threads.emplace_back([&, i] { shares.work(i, body); });
  for (std::thread& thread : threads) thread.join();
}
template <int64_t kThreads>
void forward_on(const kernels::GatedDeltaRuleForward& problem) {
  kernels::GatedDeltaRuleForward p = problem;
  p.threads = kThreads;
  p.parallel_for = on_threads<kThreads>;
  cpu::chunk_gated_delta_rule(p);
}
template <int64_t kThreads>
void backward_on(const kernels::GatedDeltaRuleBackward& problem) {
  kernels::GatedDeltaRuleBackward p = problem;
  p.threads = kThreads;
  p.parallel_for = on_threads<kThreads>;
  cpu::chunk_gated_delta_rule_backward(p);
}

/// Cut as for 16 threads, but one does it all, with one set of buffers.
void backward_by_phases(const kernels::GatedDeltaRuleBackward& problem) {
  kernels::GatedDeltaRuleBackward p = problem;
  p.threads = 16;
  cpu::chunk_gated_delta_rule_backward(p);
}

double norm(const Values& values) {
  double sum = 0;
  for (const double value : values) sum += value * value;
  return std::sqrt(sum);  // NaN if anything was not written
}

double error_norm(const Values& got, const Values& want) {
  Values difference(want.size());
  for (size_t i = 0; i < want.size(); ++i) difference[i] = got[i] - want[i];
  return norm(difference);
}

void expect_as_good_as_plain(const Results& got, const Results& plain, const Results& exact) {
  for (const auto& [name, values] : got) {
    const Values& want = exact.at(name);
    ASSERT_EQ(values.size(), want.size()) << name;
    const double error = error_norm(values, want);
    const double plain_error = error_norm(plain.at(name), want);
    EXPECT_LE(error, 2 * plain_error + 0x1p-22 * norm(want))
        << name << ": relative error " << error / norm(want) << ", of plain fp32 loops "
        << plain_error / norm(want);
  }
}

void compare(const Case& c) {
  SCOPED_TRACE(testing::Message() << c);
  const GatedDeltaRuleInputs inputs = random_inputs(c);
  Case wide = c;
  wide.dtype = DType::f64;
  const Results exact = run(wide, inputs, reference::recurrent_gated_delta_rule<double>,
                            reference::recurrent_gated_delta_rule_backward<double>);
  const Results plain = run(c, inputs, reference::chunk_gated_delta_rule<float>,
                            reference::chunk_gated_delta_rule_backward<float>);
  for_each_target([&] {
    const Results chunked = run(c, inputs, cpu::chunk_gated_delta_rule,
                                cpu::chunk_gated_delta_rule_backward, two_uneven_ranges);
    expect_as_good_as_plain(chunked, plain, exact);
    const Results recurrent =
        run(c, inputs, cpu::recurrent_gated_delta_rule, nullptr, two_uneven_ranges);
    expect_as_good_as_plain(recurrent, plain, exact);
  });
}

std::vector<Case> fixed_cases() {
  std::vector<Case> cases;
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
    for (const int64_t T : {1, 15, 64, 65}) {
      cases.push_back({.B = 2,
                       .T = T,
                       .HV = 2,
                       .K = 17,
                       .V = 9,
                       .chunk_size = 64,
                       .dtype = dtype,
                       .qk_l2norm = true});
    }
    cases.push_back({.T = 90,
                     .H = 2,
                     .HV = 4,
                     .K = 32,
                     .V = 48,
                     .cu_seqlens = {0, 0, 33, 33, 34, 90, 90},
                     .dtype = dtype,
                     .state_v_first = true});
  }
  // More than one segment, so that the backward replays from kept states.
  const int64_t segments = 2 * kernels::kSegmentTokens + 70;
  const DType f32 = DType::f32;
  cases.push_back(
      {.T = segments, .HV = 2, .K = 8, .V = 16, .chunk_size = 64, .dtype = f32, .qk_l2norm = true});
  cases.push_back({.T = 1200,
                   .K = 8,
                   .V = 8,
                   .cu_seqlens = {0, 1100, 1200},
                   .chunk_size = 128,
                   .dtype = f32,
                   .qk_l2norm = true,
                   .states = false});
  cases.push_back(
      {.T = 130, .K = 128, .V = 128, .chunk_size = 64, .dtype = f32, .qk_l2norm = true});
  cases.push_back({.T = 70,
                   .K = 256,
                   .V = 40,
                   .chunk_size = 64,
                   .dtype = DType::bf16,
                   .qk_l2norm = true,
                   .state_v_first = true});
  cases.push_back({.T = 0, .K = 8, .V = 8, .cu_seqlens = {0, 0}, .dtype = f32, .qk_l2norm = true});
  for (const double min_g : {0.0, -60.0}) {
    cases.push_back({.T = 100,
                     .K = 16,
                     .V = 16,
                     .chunk_size = 64,
                     .dtype = f32,
                     .qk_l2norm = true,
                     .min_g = min_g});
  }
  return cases;
}

std::vector<Case> random_cases(int count) {
  std::mt19937 random(7);
  const auto pick = [&](int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(random);
  };
  std::vector<Case> cases;
  for (int i = 0; i < count; ++i) {
    Case c{.B = pick(1, 2),
           .T = pick(1, 200),
           .H = pick(1, 2),
           .K = pick(1, 70),
           .V = pick(1, 70),
           .chunk_size = int64_t{16} << pick(0, 3)};
    c.HV = c.H * pick(1, 3);
    c.dtype = std::vector{DType::f32, DType::bf16, DType::f16}.at(pick(0, 2));
    c.qk_l2norm = pick(0, 3) > 0;
    c.state_v_first = pick(0, 1) == 1;
    c.states = pick(0, 1) == 1;
    if (pick(0, 1) == 1) {
      c.B = 1;
      for (int64_t end = 0; end < c.T; end += pick(0, 60)) c.cu_seqlens.push_back(end);
      c.cu_seqlens.push_back(c.T);
    }
    cases.push_back(c);
  }
  return cases;
}

/// Runs every case with numbers of its own.
void compare_all(std::vector<Case> cases, uint64_t seed) {
  for (Case& c : cases) {
    c.seed = ++seed;
    c.max_beta = 2;
    compare(c);
  }
}

TEST(GatedDeltaRuleSimd, AgreesWithTheReferenceAtChosenShapes) { compare_all(fixed_cases(), 0); }

TEST(GatedDeltaRuleSimd, AgreesWithTheReferenceAtRandomShapes) {
  compare_all(random_cases(60), 100);
}

TEST(GatedDeltaRuleSimd, TheSameBitsOnEveryRunAndForEveryPartition) {
  const Case c{.B = 2,
               .T = 150,
               .H = 2,
               .HV = 4,
               .K = 24,
               .V = 40,
               .chunk_size = 64,
               .dtype = DType::f32,
               .qk_l2norm = true};
  const GatedDeltaRuleInputs inputs = random_inputs(c);
  const auto results = [&](ParallelFor parallel_for) {
    return run(c, inputs, cpu::chunk_gated_delta_rule, cpu::chunk_gated_delta_rule_backward,
               parallel_for);
  };
  const Results one = results(kernels::serial_for);
  EXPECT_EQ(results(two_uneven_ranges), one);
  EXPECT_EQ(results(backwards_on_two_threads), one);
  EXPECT_EQ(run(c, inputs, forward_for_many_threads, cpu::chunk_gated_delta_rule_backward), one);
}

TEST(GatedDeltaRuleSimd, FewHeadsHaveTheSameBitsOnAnyNumberOfThreads) {
  const int64_t segments = 2 * kernels::kSegmentTokens + 90;
  const DType f32 = DType::f32, bf16 = DType::bf16;
  const std::vector<Case> cases = {
      {.T = segments, .K = 20, .V = 48, .chunk_size = 64, .dtype = f32, .qk_l2norm = true},
      {.T = segments,
       .HV = 2,
       .K = 16,
       .V = 100,
       .cu_seqlens = {0, 3, 3, 90, segments - 5, segments},
       .chunk_size = 64,
       .dtype = bf16,
       .qk_l2norm = true,
       .state_v_first = true},
      {.B = 2, .T = 70, .HV = 3, .K = 64, .V = 256, .chunk_size = 32, .dtype = f32},
      {.T = 130, .H = 2, .HV = 4, .K = 33, .V = 120, .dtype = f32, .states = false},
  };
  for (const Case& c : cases) {
    SCOPED_TRACE(testing::Message() << c);
    const GatedDeltaRuleInputs inputs = random_inputs(c);
    const Results one = run(c, inputs, forward_on<1>, backward_on<1>);
    EXPECT_EQ(run(c, inputs, forward_on<2>, backward_on<2>), one);
    EXPECT_EQ(run(c, inputs, forward_on<3>, backward_on<3>), one);
    EXPECT_EQ(run(c, inputs, forward_on<7>, backward_on<7>), one);
    EXPECT_EQ(run(c, inputs, forward_on<16>, backward_on<16>), one);
  }
}

TEST(GatedDeltaRuleSimd, NotANumberStaysWhereItIsOnAnyNumberOfThreads) {
  const Case c{.T = 130, .HV = 2, .K = 16, .V = 120, .chunk_size = 64, .dtype = DType::f32};
  GatedDeltaRuleInputs inputs = random_inputs(c);
  // Token 1 of the first head, in the second of three slices, whose buffers the third uses next.
  inputs.d_o[1 * 2 * 120 + 75] = std::numeric_limits<double>::quiet_NaN();
  const auto marked = [](Results results) {
    for (auto& [name, values] : results) {
      for (double& value : values) value = std::isnan(value) ? 1e300 : value;
    }
    return results;
  };
  for_each_target([&] {
    EXPECT_EQ(
        marked(run(c, inputs, cpu::chunk_gated_delta_rule, backward_by_phases)),
        marked(run(c, inputs, cpu::chunk_gated_delta_rule, cpu::chunk_gated_delta_rule_backward)));
  });
}

TEST(ColumnSlices, AreAsManyAsEndSoonest) {
  EXPECT_EQ(cpu::column_slices(/*tasks=*/32, /*V=*/128, /*threads=*/2), 1);
  EXPECT_EQ(cpu::column_slices(16, 128, 16), 1);
  EXPECT_EQ(cpu::column_slices(2, 128, 16), 4);
  EXPECT_EQ(cpu::column_slices(6, 128, 14), 2);
  EXPECT_EQ(cpu::column_slices(6, 128, 4), 1);
  EXPECT_EQ(cpu::column_slices(1, 16, 16), 1);
  for (const int64_t V : {1, 31, 64, 100, 256}) {
    const int64_t slices = cpu::column_slices(1, V, 64);
    int64_t next = 0;
    for (int64_t i = 0; i < slices; ++i) {
      const cpu::Columns columns = cpu::column_slice(V, slices, i);
      EXPECT_EQ(columns.first, next) << "V " << V;
      EXPECT_GT(columns.count, 0) << "V " << V;
      next += columns.count;
    }
    EXPECT_EQ(next, V);
  }
}

TEST(InPhases, WhereHalfOfTheThreadsWouldBeIdle) {
  EXPECT_FALSE(cpu::in_phases(/*tasks=*/1, /*threads=*/1));
  EXPECT_TRUE(cpu::in_phases(1, 2));
  EXPECT_TRUE(cpu::in_phases(8, 16));
  EXPECT_FALSE(cpu::in_phases(9, 16));
}

}  // namespace
}  // namespace gdn::test
