// The gated delta rule operators on CUDA against the CPU's: in fp64 (the reference loops) as the
// truth, and in the same dtype as what fp32 arithmetic reaches. Needs a GPU.
//
// An error may be twice the CPU's, plus the rounding of the result to its dtype, plus what the
// products round by, relative to the norm of the result: in fp32 sums of C + K terms,
// 2^-24 sqrt(C + K); 16-bit inputs are multiplied in TF32, whose operands (of which up to eight lie
// between inputs and gradients) are rounded to 2^-12; the Hopper kernels round their operands to
// the inputs' dtype, 8 times on the way forward and 8 on the way back, as their own tests say, and
// q, k and their gradients once more to normalise them.
#include <cmath>
#include <map>
#include <random>
#include <string>
#include <support/gated_delta_rule_tensors.h>
#include <support/operators.h>
#include <support/tensor.h>
#include <vector>

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <gdn/ops/gated_delta_rule/gated_delta_rule.h>

namespace gdn::test {
namespace {

using Results = std::map<std::string, at::Tensor>;

GatedDeltaRuleTensors on_cuda(const GatedDeltaRuleTensors& x) {
  GatedDeltaRuleTensors moved = x;
  for (auto& [name, tensor] : moved.by_name()) *tensor = tensor->to(at::kCUDA);
  return moved;
}

Results run(GatedDeltaRuleOp op, const GatedDeltaRuleTensors& x, GatedDeltaRuleOptions options,
            const GatedDeltaRuleOutputs& d) {
  const at::Device device = x.q.device();
  if (options.cu_seqlens) options.cu_seqlens = options.cu_seqlens->to(device);
  Results results =
      outputs_and_gradients([&](const GatedDeltaRuleTensors& y) { return call_op(op, y, options); },
                            x, {d.o.to(device), d.final_state.to(device)});
  for (auto& [name, tensor] : results) tensor = tensor.cpu();
  return results;
}

double unit_roundoff(at::ScalarType dtype) {
  return dtype == at::kBFloat16 ? 0x1p-9 : dtype == at::kHalf ? 0x1p-12 : 0x1p-24;
}

double distance(const at::Tensor& got, const at::Tensor& want) {
  return (got.to(at::kDouble) - want).norm().item<double>();
}

void expect_cuda_matches(GatedDeltaRuleOp op, const GatedDeltaRuleTensors& x,
                         const GatedDeltaRuleOptions& options, bool hopper = false) {
  const GatedDeltaRuleOutputs d = random_output_gradients(x);
  const Results exact = run(op, x.to(at::kDouble), options, d);
  const Results on_cpu = run(op, x, options, d);
  const Results got = run(op, on_cuda(x), options, d);
  const at::ScalarType dtype = x.q.scalar_type();
  const double terms = std::sqrt(static_cast<double>(64 + x.k.size(3))) * 0x1p-24;
  const double products = dtype == at::kFloat ? terms : 8 * 0x1p-12;
  for (const auto& [name, want] : exact) {
    const at::Tensor& result = got.at(name);
    ASSERT_TRUE(result.isfinite().all().item<bool>()) << name << " is not finite";
    double units = unit_roundoff(result.scalar_type()) + products;
    const bool forward = name == "o" || name == "final_state";
    if (hopper) units += (forward ? 10 : 18) * unit_roundoff(dtype);
    const double norm = want.norm().item<double>();
    const double error = distance(result, want);
    EXPECT_LE(error, 2 * distance(on_cpu.at(name), want) + units * norm)
        << name << ": relative to the norm " << error / norm << ", CPU "
        << distance(on_cpu.at(name), want) / norm << ", bound of products " << units;
  }
}

/// With chunk_size 32 the portable kernels serve every size; 64 leaves heads of 128 to Hopper's.
GatedDeltaRuleOptions options_for(int64_t chunk_size, bool qk_l2norm, bool v_first = false) {
  GatedDeltaRuleOptions options;
  options.chunk_size = chunk_size;
  options.use_qk_l2norm_in_kernel = qk_l2norm;
  options.state_v_first = v_first;
  return options;
}

GatedDeltaRuleTensors tensors_for(const GatedDeltaRuleShape& shape,
                                  const GatedDeltaRuleOptions& options) {
  GatedDeltaRuleTensors x = random_tensors(shape);
  if (options.state_v_first) x.initial_state = x.initial_state.transpose(2, 3).contiguous();
  return x;
}

std::string describe(const GatedDeltaRuleShape& s) {
  std::ostringstream text;
  text << "B " << s.B << " T " << s.T << " H/HV " << s.H << "/" << s.HV << " K " << s.K << " V "
       << s.V << " " << s.dtype << " min_g " << s.min_g << " max_beta " << s.max_beta << " seed "
       << s.seed;
  return text.str();
}

class CudaGatedDeltaRule : public testing::TestWithParam<int> {};
INSTANTIATE_TEST_SUITE_P(RandomShapes, CudaGatedDeltaRule, testing::Range(0, 24));

TEST_P(CudaGatedDeltaRule, RandomShapes) {
  std::mt19937_64 engine(static_cast<uint64_t>(GetParam()));
  const auto draw = [&](int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(engine);
  };
  const auto pick = [&](const auto& values) {
    return values.at(static_cast<size_t>(draw(0, static_cast<int64_t>(values.size()) - 1)));
  };
  GatedDeltaRuleOptions options = options_for(32, draw(0, 1) == 0, draw(0, 1) == 0);
  const bool packed = draw(0, 2) == 0;
  GatedDeltaRuleShape shape;
  shape.B = packed ? 1 : draw(1, 3);
  shape.T = draw(1, 220);
  shape.H = draw(1, 2);
  shape.HV = shape.H * draw(1, 3);
  shape.K = GetParam() % 2 == 0 ? draw(1, 70) : 16 * draw(1, 8);
  shape.V = GetParam() % 2 == 0 ? draw(1, 70) : 16 * draw(1, 8);
  shape.dtype = pick(std::vector<at::ScalarType>{at::kFloat, at::kBFloat16, at::kHalf});
  shape.min_g = pick(std::vector<double>{0, -0.01, -0.5, -5, -60});
  shape.max_beta = shape.min_g == 0 ? 1 : draw(1, 2);
  shape.seed = static_cast<uint64_t>(GetParam());
  if (packed) {
    std::vector<int64_t> ends = {0};
    while (ends.back() < shape.T) ends.push_back(std::min(shape.T, ends.back() + draw(0, 90)));
    options.cu_seqlens = torch::tensor(ends);
    shape.N = static_cast<int64_t>(ends.size()) - 1;
  }
  SCOPED_TRACE(describe(shape));
  const GatedDeltaRuleTensors x = tensors_for(shape, options);
  expect_cuda_matches(chunk_gated_delta_rule, x, options);
  expect_cuda_matches(fused_recurrent_gated_delta_rule, x, options);
}

TEST(CudaGatedDeltaRuleSizes, HeadSizesToTheLargest) {
  uint64_t seed = 50;
  for (const auto& [K, V] : std::vector<std::pair<int64_t, int64_t>>{{128, 128},
                                                                     {64, 64},
                                                                     {96, 192},
                                                                     {192, 96},
                                                                     {256, 512},
                                                                     {300, 64},
                                                                     {512, 40},
                                                                     {500, 70},
                                                                     {3, 300}}) {
    for (const auto dtype : {at::kFloat, at::kBFloat16}) {
      const GatedDeltaRuleShape shape = {
          .B = 1, .T = 150, .H = 1, .HV = 2, .K = K, .V = V, .dtype = dtype, .seed = ++seed};
      SCOPED_TRACE(describe(shape));
      for (const bool v_first : {false, true}) {
        const auto options = options_for(32, /*qk_l2norm=*/true, v_first);
        const auto x = tensors_for(shape, options);
        expect_cuda_matches(chunk_gated_delta_rule, x, options);
        expect_cuda_matches(fused_recurrent_gated_delta_rule, x, options);
      }
    }
  }
}

TEST(CudaGatedDeltaRuleSizes, HopperWithAndWithoutTheL2Norm) {
  for (const bool qk_l2norm : {false, true}) {
    for (const auto dtype : {at::kBFloat16, at::kHalf}) {
      const GatedDeltaRuleShape shape = {
          .B = 2, .T = 200, .H = 2, .HV = 4, .K = 128, .V = 128, .dtype = dtype, .seed = 90};
      SCOPED_TRACE(describe(shape));
      const auto options = options_for(64, qk_l2norm);
      expect_cuda_matches(chunk_gated_delta_rule, tensors_for(shape, options), options, true);
    }
  }
}

TEST(CudaGatedDeltaRuleSizes, SeveralSegments) {
  for (const auto dtype : {at::kFloat, at::kBFloat16}) {
    const GatedDeltaRuleShape shape = {.B = 2,
                                       .T = 2 * 1024 + 70,
                                       .H = 1,
                                       .HV = 2,
                                       .K = 32,
                                       .V = 48,
                                       .dtype = dtype,
                                       .min_g = -0.02,
                                       .seed = 60};
    SCOPED_TRACE(describe(shape));
    const auto options = options_for(32, /*qk_l2norm=*/true);
    expect_cuda_matches(chunk_gated_delta_rule, tensors_for(shape, options), options);
  }
  GatedDeltaRuleShape shape = {.B = 1, .T = 3000, .H = 1, .HV = 2, .K = 32, .V = 16, .seed = 61};
  shape.N = 5;
  auto options = options_for(32, /*qk_l2norm=*/true, /*v_first=*/true);
  options.cu_seqlens = torch::tensor({0, 1024, 1024, 1025, 2900, 3000});
  expect_cuda_matches(chunk_gated_delta_rule, tensors_for(shape, options), options);
}

TEST(CudaGatedDeltaRule, GatesOfMinusInfinityAndZeroKeys) {
  for (const auto dtype : {at::kFloat, at::kBFloat16}) {
    auto x = random_tensors({.B = 1, .T = 100, .K = 24, .V = 24, .dtype = dtype, .seed = 70});
    x.g.slice(1, 30, 33).fill_(-1e6);
    x.k.slice(1, 50, 60).zero_();
    x.q.slice(1, 55, 57).zero_();
    x.beta.slice(1, 10, 20).zero_();
    const auto options = options_for(32, /*qk_l2norm=*/true);
    expect_cuda_matches(chunk_gated_delta_rule, x, options);
    expect_cuda_matches(fused_recurrent_gated_delta_rule, x, options);
  }
}

TEST(CudaGatedDeltaRule, EmptySequencesKeepTheirStates) {
  auto x = random_tensors({.B = 1, .T = 0, .K = 8, .V = 8, .seed = 71, .N = 2});
  GatedDeltaRuleOptions options = options_for(32, true);
  options.cu_seqlens = torch::tensor({0, 0, 0});
  for (const auto op : {chunk_gated_delta_rule, fused_recurrent_gated_delta_rule}) {
    const GatedDeltaRuleOutputs d = random_output_gradients(x);
    const Results got = run(op, on_cuda(x), options, d);
    EXPECT_TRUE(torch::equal(got.at("final_state"), x.initial_state));
    EXPECT_TRUE(torch::equal(got.at("d_initial_state"), d.final_state));
  }
}

TEST(CudaGatedDeltaRule, TheSameBitsOnEveryRunAndForEveryNeighbour) {
  const GatedDeltaRuleShape shape = {
      .B = 3, .T = 300, .H = 2, .HV = 6, .K = 64, .V = 64, .dtype = at::kBFloat16, .seed = 80};
  const auto x = random_tensors(shape);
  const auto d = random_output_gradients(x);
  const auto options = options_for(32, /*qk_l2norm=*/true);
  const Results first = run(chunk_gated_delta_rule, on_cuda(x), options, d);
  for (int i = 0; i < 3; ++i) {
    const Results again = run(chunk_gated_delta_rule, on_cuda(x), options, d);
    for (const auto& [name, tensor] : first)
      EXPECT_TRUE(torch::equal(tensor, again.at(name))) << name;
  }
  GatedDeltaRuleTensors row = x;
  for (auto& [name, tensor] : row.by_name()) *tensor = tensor->slice(0, 1, 2);
  const Results alone = run(chunk_gated_delta_rule, on_cuda(row), options,
                            {d.o.slice(0, 1, 2), d.final_state.slice(0, 1, 2)});
  for (const auto& [name, tensor] : first) {
    EXPECT_TRUE(torch::equal(tensor.slice(0, 1, 2), alone.at(name))) << name;
  }
}

TEST(CudaGatedDeltaRule, NothingLeaksBetweenSequences) {
  auto x =
      random_tensors({.B = 1, .T = 200, .H = 1, .HV = 2, .K = 32, .V = 32, .seed = 81, .N = 2});
  auto options = options_for(32, /*qk_l2norm=*/true);
  options.cu_seqlens = torch::tensor({0, 70, 200});
  const auto d = random_output_gradients(x);
  for (const auto op : {chunk_gated_delta_rule, fused_recurrent_gated_delta_rule}) {
    const Results clean = run(op, on_cuda(x), options, d);
    GatedDeltaRuleTensors poisoned = x.to(at::kFloat);
    for (at::Tensor* tensor : {&poisoned.q, &poisoned.k, &poisoned.v, &poisoned.g}) {
      tensor->slice(1, 70, 200).fill_(std::numeric_limits<float>::quiet_NaN());
    }
    const Results results = run(op, on_cuda(poisoned), options, d);
    for (const char* name : {"o", "d_q", "d_k", "d_v", "d_g", "d_beta"}) {
      EXPECT_TRUE(torch::equal(clean.at(name).slice(1, 0, 70), results.at(name).slice(1, 0, 70)))
          << name;
    }
  }
}

TEST(CudaGatedDeltaRule, UpdatesTheStateInPlace) {
  const torch::NoGradGuard no_grad;
  for (const bool v_first : {false, true}) {
    for (const int64_t V : {64, 33}) {
      for (const int64_t T : {1, 5}) {
        const auto options = options_for(64, /*qk_l2norm=*/true, v_first);
        const auto x = tensors_for(
            {.B = 3, .T = T, .H = 2, .HV = 4, .K = 128, .V = V, .dtype = at::kBFloat16, .seed = 82},
            options);
        const auto want = call_op(fused_recurrent_gated_delta_rule, on_cuda(x), options);
        auto moved = on_cuda(x);
        const at::Tensor o = fused_recurrent_gated_delta_rule_update(
            moved.q, moved.k, moved.v, moved.g, moved.beta, moved.initial_state, options);
        EXPECT_TRUE(torch::equal(o, want.o));
        EXPECT_TRUE(torch::equal(moved.initial_state, want.final_state));
      }
    }
  }
}

TEST(CudaGatedDeltaRule, ABackwardWithoutKeptStatesComputesThem) {
  // The forward of fused_recurrent_gated_delta_rule keeps none.
  const auto x = random_tensors({.B = 2, .T = 1500, .H = 1, .HV = 1, .K = 16, .V = 16, .seed = 83});
  expect_cuda_matches(fused_recurrent_gated_delta_rule, x, options_for(64, true));
}

TEST(CudaGatedDeltaRule, RejectsWhatNoKernelServes) {
  const auto wide = on_cuda(random_tensors({.B = 1, .T = 2, .H = 1, .HV = 1, .K = 513, .V = 8}));
  expect_rejected([&] { call_op(chunk_gated_delta_rule, wide); }, "no CUDA kernel", "K = 513");
  const auto fp64 = on_cuda(random_tensors({.dtype = at::kDouble}));
  expect_rejected([&] { call_op(chunk_gated_delta_rule, fp64); }, "Double", "CPU only");
}

}  // namespace
}  // namespace gdn::test
