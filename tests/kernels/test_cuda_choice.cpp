// Which CUDA kernel is chosen, and how the portable ones cut a problem: host functions without GPU.
#include <string>

#include <gtest/gtest.h>

#include <gdn/kernels/cuda/choice.h>
#include <gdn/kernels/cuda/gated_delta_rule.h>
#include <gdn/kernels/cuda/gated_delta_rule_plan.h>
#include <gdn/kernels/cuda/small_batch_linear.h>
#include <gdn/kernels/cuda/small_batch_linear_plan.h>

namespace gdn::kernels::cuda {
namespace {

using Kernel = GatedDeltaRuleKernel;

constexpr ComputeCapability kTuring = {7, 5}, kAmpere = {8, 0}, kHopper = {9, 0},
                            kBlackwell = {10, 0};

/// A request that the Hopper kernel serves. Nothing is read behind the pointers.
GatedDeltaRuleForward hopper_request() {
  static float anything[4];
  alignas(16) static char aligned[16];
  GatedDeltaRuleForward p;
  p.B = p.N = 2;
  p.T = 300;
  p.H = 2;
  p.HV = 4;
  p.K = p.V = 128;
  p.dtype = DType::bf16;
  p.q = p.k = {aligned, 300 * 256, 256, 128};
  p.v = {aligned, 300 * 512, 512, 128};
  p.o = {aligned, 300 * 512, 512, 128};
  p.g = p.beta = anything;
  return p;
}

void expect_chosen(const GatedDeltaRuleForward& p, ComputeCapability capability, Kernel kernel,
                   const std::string& reason) {
  const GatedDeltaRuleChoice choice = choose_forward(p, /*recurrent=*/false, capability);
  EXPECT_EQ(choice.kernel, kernel) << choice.name << ": " << choice.reason;
  EXPECT_NE(choice.reason.find(reason), std::string::npos) << choice.reason;
}

TEST(CudaChoice, HopperServesItsHeadsOnHopperOnly) {
  const auto p = hopper_request();
  expect_chosen(p, kHopper, Kernel::sm90_forward, "K to 128");
  for (const ComputeCapability other : {kTuring, kAmpere, kBlackwell}) {
    expect_chosen(p, other, Kernel::chunk_forward, "not of capability 9.0");
  }
}

TEST(CudaChoice, WhatHopperCannotServeGoesToThePortableKernelWithItsReason) {
  const auto changed = [](auto change) {
    auto p = hopper_request();
    change(p);
    return p;
  };
  using P = GatedDeltaRuleForward&;
  expect_chosen(changed([](P p) { p.dtype = DType::f32; }), kHopper, Kernel::chunk_forward,
                "not bf16 or fp16");
  expect_chosen(changed([](P p) { p.K = 68; }), kHopper, Kernel::chunk_forward, "K = 68");
  expect_chosen(changed([](P p) { p.K = 264; }), kHopper, Kernel::chunk_forward, "K = 264");
  expect_chosen(changed([](P p) { p.V = 100; }), kHopper, Kernel::chunk_forward, "V = 100");
  expect_chosen(changed([](P p) { p.chunk_size = 32; }), kHopper, Kernel::chunk_forward,
                "chunk_size = 32");
  expect_chosen(changed([](P p) { p.o.data = nullptr; }), kHopper, Kernel::chunk_forward,
                "only the states");
  expect_chosen(changed([](P p) { p.v.stride_t = 516; }), kHopper, Kernel::chunk_forward,
                "multiples of 16 bytes");
  expect_chosen(changed([](P p) { p.k.stride_h = 129; }), kHopper, Kernel::chunk_forward,
                "multiples of 16 bytes");
}

TEST(CudaChoice, HopperServesOtherSizesToo) {
  auto p = hopper_request();
  p.K = 64;
  p.V = 96;
  expect_chosen(p, kHopper, Kernel::sm90_forward, "K to 128");
  p.K = 256;
  p.V = 512;
  expect_chosen(p, kHopper, Kernel::sm90_wide_forward, "K to 256");
  expect_chosen(p, kAmpere, Kernel::chunk_forward, "not of capability 9.0");
}

TEST(CudaChoice, SaysWhatThePortableKernelsMultiplyWith) {
  auto p = hopper_request();
  for (const DType dtype : {DType::bf16, DType::f16}) {
    p.dtype = dtype;
    expect_chosen(p, kTuring, Kernel::chunk_forward, "scaled fp16");
    expect_chosen(p, kAmpere, Kernel::chunk_forward, "TF32");
    expect_chosen(p, kBlackwell, Kernel::chunk_forward, "TF32");
  }
  p.dtype = DType::f32;
  expect_chosen(p, kTuring, Kernel::chunk_forward, "fp32 multiply-adds");
  expect_chosen(p, kAmpere, Kernel::chunk_forward, "fp32 multiply-adds");
}

TEST(CudaChoice, NormalisesForTheHopperKernel) {
  auto p = hopper_request();
  EXPECT_FALSE(choose_forward(p, false, kHopper).normalise_first);
  p.qk_l2norm = true;
  p.k.stride_h = 129;  // the normalised copy is aligned
  const auto choice = choose_forward(p, false, kHopper);
  EXPECT_EQ(choice.kernel, Kernel::sm90_forward);
  EXPECT_TRUE(choice.normalise_first);
  EXPECT_FALSE(choose_forward(p, false, kAmpere).normalise_first);  // it does so itself
}

TEST(CudaChoice, TheRecurrentFormHasOneKernel) {
  for (const ComputeCapability capability : {kTuring, kAmpere, kHopper, kBlackwell}) {
    EXPECT_EQ(choose_forward(hopper_request(), /*recurrent=*/true, capability).kernel,
              Kernel::recurrent_forward);
  }
}

TEST(CudaChoice, TheBackwardGoesWhereTheForwardGoes) {
  GatedDeltaRuleBackward p;
  static_cast<GatedDeltaRuleProblem&>(p) = hopper_request();
  static float states[1];
  p.segment_states = states;
  alignas(16) static char aligned[16];
  p.d_o = p.v;
  p.d_v = {aligned, p.v.stride_b, p.v.stride_t, p.v.stride_h};
  p.d_q = p.d_k = {aligned, p.q.stride_b, p.q.stride_t, p.q.stride_h};
  EXPECT_EQ(choose_backward(p, kHopper).kernel, Kernel::sm90_backward);
  EXPECT_FALSE(choose_backward(p, kHopper).normalise_first);
  p.qk_l2norm = true;
  EXPECT_TRUE(choose_backward(p, kHopper).normalise_first);
  for (const ComputeCapability other : {kTuring, kAmpere, kBlackwell}) {
    EXPECT_EQ(choose_backward(p, other).kernel, Kernel::backward);
    EXPECT_FALSE(choose_backward(p, other).normalise_first);
  }
  p.V = 64;
  EXPECT_EQ(choose_backward(p, kHopper).kernel, Kernel::sm90_wide_backward);
  p.K = 256;
  p.V = 512;
  EXPECT_EQ(choose_backward(p, kHopper).kernel, Kernel::sm90_wide_backward);
  EXPECT_EQ(choose_backward(p, kAmpere).kernel, Kernel::backward);
  p.d_o.stride_t = 1028;
  const auto choice = choose_backward(p, kHopper);
  EXPECT_EQ(choice.kernel, Kernel::backward);
  EXPECT_NE(choice.reason.find("d_o, d_q, d_k, d_v"), std::string::npos) << choice.reason;
}

TEST(CudaChoice, RefusesWhatNoKernelServes) {
  auto p = hopper_request();
  expect_chosen(p, {7, 0}, Kernel::none, "compute capability 7.0, 7.5 is needed");
  p.K = 513;
  expect_chosen(p, kHopper, Kernel::none, "K = 513 is beyond 512");
  EXPECT_EQ(choose_forward(p, /*recurrent=*/true, kHopper).kernel, Kernel::none);
  p = hopper_request();
  p.dtype = DType::f64;
  expect_chosen(p, kHopper, Kernel::none, "fp64");
  GatedDeltaRuleBackward backward;
  backward.K = 1024;
  EXPECT_EQ(choose_backward(backward, kHopper).kernel, Kernel::none);
}

TEST(CudaPlan, WavesCoverEverySequenceWithinTheScratchGoal) {
  GatedDeltaRuleProblem p;
  p.H = 3;
  p.HV = 6;
  const auto bytes = [](int64_t chunks) { return chunks * (int64_t{4} << 20); };
  for (const int64_t N : {0, 1, 7, 1000}) {
    p.N = N;
    for (const int64_t longest : {0, 1, 64, 65, 1024, 1025, 5000}) {
      const WavePlan plan = plan_waves(p, longest, bytes);
      EXPECT_GE(plan.groups * plan.pairs, N * p.H);
      EXPECT_TRUE(plan.groups == 0 || (plan.groups - 1) * plan.pairs < N * p.H);
      EXPECT_LE(plan.pairs * bytes(plan.chunks), kScratchGoal);
      EXPECT_GE(plan.chunks * 64, std::min(longest, kSegmentTokens));
      EXPECT_GE(plan.segments * kSegmentTokens, longest);
      EXPECT_GE(plan.segments, 1);
    }
  }
}

TEST(CudaPlan, ScansFitTheSharedMemoryOfEveryDevice) {
  constexpr int64_t kTuringBytes = 64 << 10, kGeForceBytes = 99 << 10, kAmpereBytes = 163 << 10;
  for (const int64_t limit : {kTuringBytes, kGeForceBytes, kAmpereBytes, int64_t{227} << 10}) {
    for (int64_t K = 1; K <= kMaxKeySize; ++K) {
      ASSERT_LE(scan_bytes(K, scan_tiles(K, limit)), limit) << "K = " << K;
    }
  }
  EXPECT_EQ(scan_tiles(128, kTuringBytes), 2);
  EXPECT_EQ(scan_tiles(256, kTuringBytes), 2);
  EXPECT_EQ(scan_tiles(384, kTuringBytes), 1);
  EXPECT_EQ(scan_tiles(128, kGeForceBytes), 4);
  EXPECT_EQ(scan_tiles(256, kGeForceBytes), 2);
  EXPECT_EQ(scan_tiles(256, kAmpereBytes), 4);
  EXPECT_EQ(scan_tiles(512, kAmpereBytes), 1);
}

TEST(CudaPlan, KeepsGridsWithinTheirLimits) {
  GatedDeltaRuleProblem p;
  p.N = 100000;
  p.H = 4;
  p.HV = 32;
  const WavePlan plan = plan_waves(p, 1, [](int64_t) { return int64_t{1}; });
  EXPECT_LE(plan.pairs * (p.HV / p.H), 65535);
  p.N = 1;
  const WavePlan one = plan_waves(p, 100000, [](int64_t) { return 2 * kScratchGoal; });
  EXPECT_EQ(one.pairs, 1);  // less is not possible
  EXPECT_EQ(one.groups, 4);
}

/// The output projection of a layer of the paper's: 3072 inputs in groups of 512, gated.
SmallBatchLinear linear_request(int64_t M) {
  alignas(16) static char aligned[16];
  SmallBatchLinear p;
  p.M = M;
  p.N = 2048;
  p.D = 3072;
  p.x = {aligned, 3072};
  p.weight = p.norm_weight = aligned;
  p.norm_size = 512;
  p.gate = {aligned, 9232};
  p.y = {aligned, 2048};
  return p;
}

constexpr int64_t kShared = 227 << 10;

void expect_refused(const SmallBatchLinear& p, ComputeCapability capability, int64_t shared_bytes,
                    const std::string& reason) {
  const std::string why_not = why_not_small_batch_linear(p, capability, shared_bytes);
  EXPECT_NE(why_not.find(reason), std::string::npos) << why_not;
}

TEST(SmallBatchLinearChoice, ServesFewAlignedRowsOf16Bits) {
  SmallBatchLinear p = linear_request(1);
  EXPECT_EQ(why_not_small_batch_linear(p, kHopper, kShared), "");
  EXPECT_EQ(why_not_small_batch_linear(p, kAmpere, kShared), "");
  expect_refused(p, kTuring, kShared, "7.5");
  p.gate.stride = 9228;  // of one row it does not matter
  EXPECT_EQ(why_not_small_batch_linear(p, kHopper, kShared), "");
  p.M = 2;
  expect_refused(p, kHopper, kShared, "16 bytes");
  expect_refused(linear_request(3), kHopper, kShared, "faster on its own");
  p = linear_request(8);
  p.norm_weight = nullptr;
  p.gate = {};
  EXPECT_EQ(why_not_small_batch_linear(p, kHopper, kShared), "");
  expect_refused(p, kHopper, 99 << 10, "do not fit shared memory");
  p.dtype = DType::f32;
  expect_refused(p, kHopper, kShared, "not bf16 or fp16");
  expect_refused(linear_request(9), kHopper, kShared, "9 rows");
  p = linear_request(1);
  p.taps = 5;
  expect_refused(p, kHopper, kShared, "5 taps");
}

TEST(SmallBatchLinearChoice, NormsOfWholeRowsOfBf16MultiplyTheProducts) {
  using Norm = SmallBatchLinearPlan::Norm;
  SmallBatchLinear p = linear_request(1);
  EXPECT_EQ(plan_small_batch_linear(p).norm, Norm::groups);
  p.norm_size = p.D;
  EXPECT_EQ(plan_small_batch_linear(p).norm, Norm::groups);  // the gate follows the factor
  p.gate = {};
  EXPECT_EQ(plan_small_batch_linear(p).norm, Norm::rows);
  p.dtype = DType::f16;
  EXPECT_EQ(plan_small_batch_linear(p).norm, Norm::groups);
  p.dtype = DType::bf16;
  p.D = p.norm_size = 3080;  // sums of squares cross warps
  EXPECT_EQ(plan_small_batch_linear(p).norm, Norm::groups);
  p.norm_weight = nullptr;
  EXPECT_EQ(plan_small_batch_linear(p).norm, Norm::none);
}

TEST(SmallBatchLinearChoice, WarpsSplitDAndPadIt) {
  for (const int64_t D : {8, 1024, 1032, 2048, 5632}) {
    SmallBatchLinear p = linear_request(2);
    p.D = D;
    p.N = 9228;
    const SmallBatchLinearPlan plan = plan_small_batch_linear(p);
    EXPECT_GE(kLinearWarps * plan.slice, D);
    EXPECT_LT(kLinearWarps * plan.slice, D + kLinearWarps * kLinearStage * kLinearStep);
    EXPECT_EQ(plan.slice, plan.stages * kLinearStage * kLinearStep);
    EXPECT_EQ(plan.stride * 2 % 128, 64);  // rows on the banks' two halves in turn
    EXPECT_EQ(plan.tiles, 1154);
    p.swiglu = true;
    EXPECT_EQ(plan_small_batch_linear(p).tiles, 2307);
  }
}

}  // namespace
}  // namespace gdn::kernels::cuda
