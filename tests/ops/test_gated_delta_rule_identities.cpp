// What must agree: forms, chunk sizes, splits, packing, neighbours, threads, layouts, in place.
#include <cmath>
#include <functional>
#include <limits>
#include <map>
#include <string>
#include <support/gated_delta_rule_tensors.h>
#include <support/targets.h>
#include <support/tensor.h>

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <gdn/ops/gated_delta_rule/gated_delta_rule.h>

namespace gdn::test {
namespace {

using Tensors = std::map<std::string, at::Tensor>;

/// Two ways to compute the same in fp32: each errs by the roundings of sums of up to T + K + V
/// products, whose signs are random: the square root of their number, times 4 for the worst
/// element.
void expect_same(const Tensors& got, const Tensors& want, double terms = 128) {
  ASSERT_EQ(got.size(), want.size());
  const double relative = 4 * std::sqrt(terms) * std::numeric_limits<float>::epsilon();
  for (const auto& [name, tensor] : want) {
    const double largest = tensor.numel() == 0 ? 0 : tensor.abs().max().item<double>();
    expect_close(got.at(name), tensor, relative * largest, name);
  }
}

void expect_identical(const Tensors& got, const Tensors& want) {
  ASSERT_EQ(got.size(), want.size());
  for (const auto& [name, tensor] : want) EXPECT_TRUE(at::equal(got.at(name), tensor)) << name;
}

class GatedDeltaRuleIdentities : public testing::TestWithParam<std::string> {
 protected:
  GatedDeltaRuleOp op() const {
    return GetParam() == "chunk" ? &chunk_gated_delta_rule : &fused_recurrent_gated_delta_rule;
  }
  Tensors run(const GatedDeltaRuleTensors& x, const GatedDeltaRuleOptions& options = {}) const {
    return run_with(x, random_output_gradients(x), options);
  }
  Tensors run_with(const GatedDeltaRuleTensors& x, const GatedDeltaRuleOutputs& d,
                   const GatedDeltaRuleOptions& options = {}) const {
    return outputs_and_gradients(
        [&](const GatedDeltaRuleTensors& y) { return call_op(op(), y, options); }, x, d);
  }
};
INSTANTIATE_TEST_SUITE_P(Forms, GatedDeltaRuleIdentities, testing::Values("chunk", "recurrent"),
                         [](const auto& info) { return info.param; });

TEST(GatedDeltaRuleForms, ChunkedEqualsRecurrent) {
  for (const int64_t T : {0, 1, 63, 64, 65, 130}) {
    SCOPED_TRACE(T);
    const auto x = random_tensors({.T = T, .K = 20, .V = 24});
    const GatedDeltaRuleOutputs chunked = call_op(chunk_gated_delta_rule, x);
    const GatedDeltaRuleOutputs recurrent = call_op(fused_recurrent_gated_delta_rule, x);
    expect_same({{"o", chunked.o}, {"final_state", chunked.final_state}},
                {{"o", recurrent.o}, {"final_state", recurrent.final_state}});
  }
}

TEST_P(GatedDeltaRuleIdentities, AnyChunkSize) {
  const auto x = random_tensors({.T = 150, .K = 20, .V = 24});
  const Tensors expected = run(x);
  for (const int64_t chunk_size : {16, 32, 128}) {
    SCOPED_TRACE(chunk_size);
    GatedDeltaRuleOptions options;
    options.chunk_size = chunk_size;
    expect_same(run(x, options), expected, 256);
  }
}

TEST_P(GatedDeltaRuleIdentities, SplitWithTheStateCarriedOver) {
  const auto x = random_tensors({.T = 150});
  const Tensors whole = run(x);
  for (const int64_t cut : {1, 64, 75, 149}) {
    SCOPED_TRACE(cut);
    const Tensors split = outputs_and_gradients(
        [&](const GatedDeltaRuleTensors& y) {
          const GatedDeltaRuleOutputs first = call_op(op(), y.slice(0, cut, 0, 2));
          GatedDeltaRuleTensors rest = y.slice(cut, 150, 0, 2);
          rest.initial_state = first.final_state;
          const GatedDeltaRuleOutputs second = call_op(op(), rest);
          return GatedDeltaRuleOutputs{at::cat({first.o, second.o}, 1), second.final_state};
        },
        x, random_output_gradients(x));
    expect_same(split, whole, 256);
  }
}

TEST_P(GatedDeltaRuleIdentities, PackedIsSeparateBitForBit) {
  const std::vector<int64_t> boundaries = {0, 0, 1, 70, 70, 140, 150, 150};
  const int64_t N = static_cast<int64_t>(boundaries.size()) - 1;
  const auto x = random_tensors({.B = 1, .T = 150, .N = N});
  const GatedDeltaRuleOutputs d = random_output_gradients(x);
  for (const auto index : {at::kLong, at::kInt}) {
    GatedDeltaRuleOptions options;
    options.cu_seqlens = at::tensor(boundaries, at::kLong).to(index);
    const Tensors packed = run_with(x, d, options);
    for (int64_t n = 0; n < N; ++n) {
      SCOPED_TRACE(n);
      const int64_t begin = boundaries[n], end = boundaries[n + 1];
      const Tensors alone = run_with(x.slice(begin, end, n, n + 1),
                                     {d.o.slice(1, begin, end), d.final_state.slice(0, n, n + 1)});
      Tensors part;
      for (const auto& [name, tensor] : packed) {
        const bool state = name == "final_state" || name == "d_initial_state";
        part[name] = state ? tensor.slice(0, n, n + 1) : tensor.slice(1, begin, end);
      }
      expect_identical(part, alone);
    }
  }
}

TEST_P(GatedDeltaRuleIdentities, ABatchRowDoesNotDependOnItsNeighbours) {
  const auto x = random_tensors({.B = 3, .T = 70});
  const GatedDeltaRuleOutputs d = random_output_gradients(x);
  const Tensors all = run_with(x, d);
  GatedDeltaRuleTensors hostile = x.to(at::kFloat);
  for (auto& [name, tensor] : hostile.by_name()) {
    tensor->select(0, 0).fill_(std::numeric_limits<float>::quiet_NaN());
    tensor->select(0, 2).fill_(std::numeric_limits<float>::infinity());
  }
  for (const auto& [name, tensor] : run_with(hostile, d)) {
    EXPECT_TRUE(at::equal(tensor[1], all.at(name)[1])) << name;
  }
}

TEST_P(GatedDeltaRuleIdentities, TheSameRunTwiceAndAnyNumberOfThreads) {
  const auto x = random_tensors({.B = 2, .T = 150, .H = 2, .HV = 6});
  const int threads = at::get_num_threads();
  at::set_num_threads(1);
  const Tensors one = run(x);
  at::set_num_threads(2);
  const Tensors two = run(x);
  const Tensors again = run(x);
  at::set_num_threads(threads);
  expect_identical(two, one);
  expect_identical(again, two);
}

TEST_P(GatedDeltaRuleIdentities, VFirstStatesAreTransposed) {
  auto x = random_tensors({.T = 70});
  const Tensors expected = run(x);
  const GatedDeltaRuleOutputs d = random_output_gradients(x);
  x.initial_state = x.initial_state.transpose(2, 3);  // not contiguous either
  GatedDeltaRuleOptions options;
  options.state_v_first = true;
  Tensors got = run_with(x, {d.o, d.final_state.transpose(2, 3)}, options);
  for (const std::string name : {"final_state", "d_initial_state"}) {
    got[name] = got[name].transpose(2, 3);
  }
  expect_identical(got, expected);
}

TEST_P(GatedDeltaRuleIdentities, GroupedHeadsAreRepeatedHeads) {
  const auto x = random_tensors({.T = 70, .H = 2, .HV = 6});
  const Tensors repeated = outputs_and_gradients(
      [&](GatedDeltaRuleTensors y) {
        y.q = y.q.repeat_interleave(3, 2);
        y.k = y.k.repeat_interleave(3, 2);
        return call_op(op(), y);
      },
      x, random_output_gradients(x));
  expect_same(run(x), repeated);
}

TEST_P(GatedDeltaRuleIdentities, StridedViewsAreTheirCopies) {
  const auto x = random_tensors({.T = 70});
  const Tensors expected = run(x);
  // q, k, v as slices of one projection; and with the last dimension strided.
  GatedDeltaRuleTensors views = x;
  const at::Tensor mixed = at::cat({x.q.flatten(2), x.k.flatten(2), x.v.flatten(2)}, -1);
  views.q = mixed.slice(-1, 0, 16).unflatten(-1, {2, 8});
  views.k = mixed.slice(-1, 16, 32).unflatten(-1, {2, 8});
  views.v = x.v.transpose(1, 3).contiguous().transpose(1, 3);
  views.g = x.g.transpose(1, 2).contiguous().transpose(1, 2);
  views.beta = x.beta.transpose(0, 2).contiguous().transpose(0, 2);
  ASSERT_FALSE(views.q.is_contiguous());
  const auto forward = call_op(op(), views);
  EXPECT_TRUE(at::equal(forward.o, expected.at("o")));
  EXPECT_TRUE(at::equal(forward.final_state, expected.at("final_state")));
  GatedDeltaRuleOutputs d = random_output_gradients(x);
  d.o = d.o.transpose(1, 2).contiguous().transpose(1, 2);
  expect_identical(run_with(views, d), expected);
}

TEST_P(GatedDeltaRuleIdentities, OptionsAreTheirOperatorsOutside) {
  auto x = random_tensors({.T = 70});
  x.g = at::randn_like(x.g);
  x.beta = at::randn_like(x.beta);
  const at::Tensor A_log = at::randn({4});
  const at::Tensor dt_bias = at::randn({4});
  GatedDeltaRuleOptions options;
  options.use_qk_l2norm_in_kernel = true;
  options.use_beta_sigmoid_in_kernel = true;
  options.allow_neg_eigval = true;
  options.use_gate_in_kernel = true;
  options.A_log = A_log;
  options.dt_bias = dt_bias;
  const Tensors outside = outputs_and_gradients(
      [&](GatedDeltaRuleTensors y) {
        y.q = y.q * (y.q * y.q).sum(-1, true).add(1e-6).rsqrt();
        y.k = y.k * (y.k * y.k).sum(-1, true).add(1e-6).rsqrt();
        y.beta = 2 * y.beta.sigmoid();
        y.g = -A_log.exp() * at::softplus(y.g + dt_bias);
        return call_op(op(), y);
      },
      x, random_output_gradients(x));
  expect_same(run(x, options), outside);
}

TEST(GatedDeltaRuleUpdate, EqualsTheFunctionalFormBitForBit) {
  for (const auto dtype : {at::kFloat, at::kBFloat16, at::kDouble}) {
    for (const bool v_first : {false, true}) {
      const auto x = random_tensors({.T = 5, .K = 6, .dtype = dtype});  // K = V: one state shape
      GatedDeltaRuleOptions options;
      options.use_qk_l2norm_in_kernel = true;
      options.use_beta_sigmoid_in_kernel = true;
      options.state_v_first = v_first;
      const auto expected = call_op(fused_recurrent_gated_delta_rule, x, options);
      at::Tensor state = x.initial_state.clone();
      const at::Tensor o =
          fused_recurrent_gated_delta_rule_update(x.q, x.k, x.v, x.g, x.beta, state, options);
      EXPECT_TRUE(at::equal(o, expected.o));
      EXPECT_TRUE(at::equal(state, expected.final_state));
      // A view into a larger cache, with gaps.
      at::Tensor cache = at::zeros({2, 8, 6, 6}, state.options());
      at::Tensor slice = cache.slice(1, 0, 4);
      slice.copy_(x.initial_state);
      fused_recurrent_gated_delta_rule_update(x.q, x.k, x.v, x.g, x.beta, slice, options);
      EXPECT_TRUE(at::equal(slice, expected.final_state));
      EXPECT_EQ(cache.slice(1, 4).abs().max().item<double>(), 0);
    }
  }
}

TEST(GatedDeltaRuleUpdate, AStateInBf16IsRoundedOncePerCall) {
  for_each_target([] {
    for (const bool v_first : {false, true}) {
      for (const int64_t T : {1, 3, 70}) {
        for (const int64_t size : {6, 32}) {  // unaligned columns, and whole vectors
          SCOPED_TRACE(testing::Message() << T << " tokens, K = V = " << size);
          const auto x = random_tensors(
              {.T = T, .K = size, .V = size, .dtype = T == 3 ? at::kBFloat16 : at::kFloat});
          GatedDeltaRuleOptions options;
          options.state_v_first = v_first;
          const at::Tensor rounded = x.initial_state.to(at::kBFloat16);
          at::Tensor wide = rounded.to(at::kFloat), narrow = rounded.clone();
          const auto update = [&](at::Tensor& state) {
            return fused_recurrent_gated_delta_rule_update(x.q, x.k, x.v, x.g, x.beta, state,
                                                           options);
          };
          const at::Tensor expected = update(wide);
          EXPECT_TRUE(at::equal(update(narrow), expected));
          EXPECT_TRUE(at::equal(narrow, wide.to(at::kBFloat16)));
        }
      }
    }
  });
}

TEST(GatedDeltaRuleUpdate, PackedSequencesOfOneTokenEach) {
  const auto rows = random_tensors({.B = 3, .T = 1});
  at::Tensor expected_state = rows.initial_state.clone();
  const at::Tensor expected = fused_recurrent_gated_delta_rule_update(
      rows.q, rows.k, rows.v, rows.g, rows.beta, expected_state);
  GatedDeltaRuleOptions options;
  options.cu_seqlens = at::arange(4);
  at::Tensor state = rows.initial_state.clone();
  const auto packed = [](const at::Tensor& x) { return x.transpose(0, 1); };
  const at::Tensor o =
      fused_recurrent_gated_delta_rule_update(packed(rows.q), packed(rows.k), packed(rows.v),
                                              packed(rows.g), packed(rows.beta), state, options);
  EXPECT_TRUE(at::equal(packed(o), expected));
  EXPECT_TRUE(at::equal(state, expected_state));
}

// Results own their memory: writing to one changes no input.
TEST_P(GatedDeltaRuleIdentities, OutputsShareNoMemoryWithInputs) {
  const auto x = random_tensors({.T = 0});
  const GatedDeltaRuleOutputs y = call_op(op(), x);
  EXPECT_TRUE(at::equal(y.final_state, x.initial_state));
  EXPECT_FALSE(y.final_state.is_alias_of(x.initial_state));
}

}  // namespace
}  // namespace gdn::test
