// The operators against the plain recurrence in fp64: at random shapes and on hostile inputs, in
// every dtype, outputs and gradients. An error may be at most twice that of the plain recurrence in
// fp32 on the same inputs, which rounds the result to the same dtype, plus what sums in fp32 leave
// where that error happens to be small. The rounding errors of a sum of n terms, one after another,
// are a random walk: about 0.3 2^-24 sqrt(n) of it. Terms are the K of a product with keys, the
// tokens of a chunk, and for gradients also the V of a product with values. An output passes
// through at most four such sums (S k, the triangular solve, P U, S q), a gradient through eight
// (those again and their adjoints), which adds up to
//
//   0.3 2^-24 sqrt(4 (K + min(T, C))) and 0.3 2^-24 sqrt(8 (K + V + min(T, C))) of the norm.
#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <random>
#include <sstream>
#include <string>
#include <support/gated_delta_rule_tensors.h>
#include <support/tensor.h>
#include <vector>

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <gdn/ops/gated_delta_rule/gated_delta_rule.h>

namespace gdn::test {
namespace {

using Tensors = std::map<std::string, at::Tensor>;

/// The plain recurrence with packing and V-first states.
GatedDeltaRuleOutputs plain(const GatedDeltaRuleTensors& x, const GatedDeltaRuleOptions& options) {
  const auto swapped = [&](const at::Tensor& state) {
    return options.state_v_first ? state.transpose(2, 3) : state;
  };
  GatedDeltaRuleTensors all = x;
  all.initial_state = swapped(x.initial_state);
  if (!options.cu_seqlens) {
    const GatedDeltaRuleOutputs y = plain_gated_delta_rule(all, options);
    return {y.o, swapped(y.final_state)};
  }
  std::vector<at::Tensor> o, final_state;
  for (int64_t n = 0; n + 1 < options.cu_seqlens->numel(); ++n) {
    const auto begin = (*options.cu_seqlens)[n].item<int64_t>();
    const auto end = (*options.cu_seqlens)[n + 1].item<int64_t>();
    const GatedDeltaRuleOutputs y =
        plain_gated_delta_rule(all.slice(begin, end, n, n + 1), options);
    o.push_back(y.o);
    final_state.push_back(swapped(y.final_state));
  }
  return {at::cat(o, 1), at::cat(final_state, 0)};
}

double distance(const at::Tensor& got, const at::Tensor& want) {
  return (got.to(at::kDouble) - want).norm().item<double>();
}

/// `op` on x, an output or gradient a line, is as precise as the head comment promises.
void check_precision(GatedDeltaRuleOp op, const GatedDeltaRuleTensors& x,
                     const GatedDeltaRuleOptions& options, const Tensors& exact,
                     const Tensors& plain_fp32) {
  const Tensors got =
      outputs_and_gradients([&](const GatedDeltaRuleTensors& y) { return call_op(op, y, options); },
                            x, random_output_gradients(x));
  for (const auto& [name, want] : exact) {
    const at::Tensor& result = got.at(name);
    ASSERT_TRUE(result.isfinite().all().item<bool>()) << name << " is not finite";
    const bool gradient = name.starts_with("d_");
    const auto terms = static_cast<double>(std::min(options.chunk_size, x.k.size(1)) + x.k.size(3) +
                                           (gradient ? x.v.size(3) : 0));
    const double rounding = 0.3 * 0x1p-24 * std::sqrt((gradient ? 8 : 4) * terms);
    EXPECT_LE(distance(result, want),
              2 * distance(plain_fp32.at(name), want) + rounding * want.norm().item<double>())
        << name;
  }
}

void check_precision(const GatedDeltaRuleTensors& x, const GatedDeltaRuleOptions& options) {
  const auto by_plain_loops = [&](const GatedDeltaRuleTensors& inputs) {
    return outputs_and_gradients([&](const GatedDeltaRuleTensors& y) { return plain(y, options); },
                                 inputs, random_output_gradients(x));
  };
  const Tensors exact = by_plain_loops(x.to(at::kDouble));
  const Tensors plain_fp32 = by_plain_loops(x);
  {
    SCOPED_TRACE("chunk");
    check_precision(chunk_gated_delta_rule, x, options, exact, plain_fp32);
  }
  SCOPED_TRACE("recurrent");
  check_precision(fused_recurrent_gated_delta_rule, x, options, exact, plain_fp32);
}

class GatedDeltaRulePrecision : public testing::TestWithParam<int> {};
INSTANTIATE_TEST_SUITE_P(RandomShapes, GatedDeltaRulePrecision, testing::Range(0, 40));

TEST_P(GatedDeltaRulePrecision, OfEveryResult) {
  std::mt19937_64 engine(static_cast<uint64_t>(GetParam()));
  const auto draw = [&](int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(engine);
  };
  const auto pick = [&](const auto& values) {
    return values.at(static_cast<size_t>(draw(0, static_cast<int64_t>(values.size()) - 1)));
  };
  const bool packed = draw(0, 2) == 0;
  GatedDeltaRuleOptions options;
  options.use_qk_l2norm_in_kernel = draw(0, 1) == 0;
  options.state_v_first = draw(0, 1) == 0;
  options.chunk_size = pick(std::vector<int64_t>{16, 32, 64, 128});

  GatedDeltaRuleShape shape;
  shape.B = packed ? 1 : draw(1, 3);
  shape.T = draw(1, 100);
  shape.H = draw(1, 3);
  shape.HV = shape.H * draw(1, 3);
  shape.K = draw(1, 40);
  shape.V = draw(1, 40);
  shape.dtype = pick(std::vector<at::ScalarType>{at::kFloat, at::kBFloat16, at::kHalf});
  shape.min_g = pick(std::vector<double>{-0.01, -0.5, -5, -60});
  shape.max_beta = options.use_qk_l2norm_in_kernel ? 2 : 1;
  shape.seed = static_cast<uint64_t>(GetParam());
  std::vector<int64_t> boundaries = {0};
  while (packed && boundaries.back() < shape.T) {
    boundaries.push_back(std::min(shape.T, boundaries.back() + draw(0, 60)));
  }
  if (packed) {
    shape.N = static_cast<int64_t>(boundaries.size()) - 1;
    options.cu_seqlens = at::tensor(boundaries, at::kLong);
  }
  std::ostringstream description;
  description << "B " << shape.B << " T " << shape.T << " H " << shape.H << " HV " << shape.HV
              << " K " << shape.K << " V " << shape.V << " " << shape.dtype << " min_g "
              << shape.min_g << " C " << options.chunk_size << " l2norm "
              << options.use_qk_l2norm_in_kernel << " v_first " << options.state_v_first
              << " cu_seqlens " << (packed ? at::IntArrayRef(boundaries) : at::IntArrayRef());
  SCOPED_TRACE(description.str());

  GatedDeltaRuleTensors x = random_tensors(shape);
  if (options.state_v_first) x.initial_state = x.initial_state.transpose(2, 3).contiguous();
  check_precision(x, options);
}

TEST(GatedDeltaRuleHostileInputs, LengthsAroundAChunk) {
  for (const int64_t T : {1, 15, 16, 17, 31, 32, 33}) {
    SCOPED_TRACE(T);
    GatedDeltaRuleOptions options;
    options.chunk_size = 16;
    check_precision(random_tensors({.T = T}), options);
  }
}

TEST(GatedDeltaRuleHostileInputs, NoTokens) {
  const auto x = random_tensors({.T = 0});
  for (const GatedDeltaRuleOp op : {&chunk_gated_delta_rule, &fused_recurrent_gated_delta_rule}) {
    const GatedDeltaRuleOutputs d = random_output_gradients(x);
    const Tensors got =
        outputs_and_gradients([&](const GatedDeltaRuleTensors& y) { return call_op(op, y); }, x, d);
    EXPECT_EQ(got.at("o").sizes(), x.v.sizes());
    EXPECT_EQ(got.at("d_q").sizes(), x.q.sizes());
    EXPECT_TRUE(at::equal(got.at("final_state"), x.initial_state));
    EXPECT_TRUE(at::equal(got.at("d_initial_state"), d.final_state));
  }
}

TEST(GatedDeltaRuleHostileInputs, ConstantGates) {
  for (const double g : {0.0, -50.0, -1e4}) {
    SCOPED_TRACE(g);
    auto x = random_tensors({.T = 70});
    x.g.fill_(g);
    check_precision(x, {});
  }
}

TEST(GatedDeltaRuleHostileInputs, AFewStrongGatesAmongWeakOnes) {
  for (const double g : {-20.0, -1e4, -std::numeric_limits<double>::infinity()}) {
    SCOPED_TRACE(g);
    auto x = random_tensors({.T = 70, .min_g = -0.01});
    for (const int64_t t : {0, 5, 6, 63, 64}) x.g.select(1, t).fill_(g);
    check_precision(x, {});
  }
}

TEST(GatedDeltaRuleHostileInputs, ConstantStrengths) {
  for (const double beta : {0.0, 1.0, 2.0}) {
    SCOPED_TRACE(beta);
    auto x = random_tensors({.T = 70});
    x.beta.fill_(beta);
    GatedDeltaRuleOptions options;
    options.use_qk_l2norm_in_kernel = true;
    check_precision(x, options);
  }
}

TEST(GatedDeltaRuleHostileInputs, ZeroKeysAndQueries) {
  auto x = random_tensors({.T = 70});
  x.k.slice(1, 0, 40).zero_();
  x.q.slice(1, 30).zero_();
  GatedDeltaRuleOptions options;
  for (const bool normalised : {false, true}) {
    options.use_qk_l2norm_in_kernel = normalised;
    check_precision(x, options);
  }
}

// The same key again and again: the triangular system is as far from the identity as it can be.
TEST(GatedDeltaRuleHostileInputs, RepeatedKeys) {
  auto x = random_tensors({.T = 70, .min_g = 0});
  x.k.copy_(x.k.slice(1, 0, 1).expand_as(x.k));
  x.beta.fill_(1);
  GatedDeltaRuleOptions options;
  options.use_qk_l2norm_in_kernel = true;
  check_precision(x, options);
}

}  // namespace
}  // namespace gdn::test
