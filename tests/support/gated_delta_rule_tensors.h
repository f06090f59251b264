// Random inputs of the gated delta rule operators, and the recurrence in plain torch operators.
#pragma once

#include <cmath>
#include <map>
#include <string>
#include <tuple>
#include <vector>

#include <torch/torch.h>

#include <gdn/ops/gated_delta_rule/gated_delta_rule.h>

namespace gdn::test {

struct GatedDeltaRuleShape {
  int64_t B = 2, T = 37, H = 2, HV = 4, K = 8, V = 6;
  at::ScalarType dtype = at::kFloat;
  double min_g = -0.5;  // g is uniform in [min_g, 0]
  double max_beta = 1;
  uint64_t seed = 0;
  int64_t N = 0;  // sequences, where not B
};

struct GatedDeltaRuleTensors {
  at::Tensor q, k, v, g, beta, initial_state;

  std::map<std::string, at::Tensor*> by_name() {
    return {{"q", &q}, {"k", &k},       {"v", &v},
            {"g", &g}, {"beta", &beta}, {"initial_state", &initial_state}};
  }
  /// Detached copies with the same values, q, k, v in `dtype` and the rest to match.
  GatedDeltaRuleTensors to(at::ScalarType dtype) const {
    const auto gates = dtype == at::kDouble ? at::kDouble : at::kFloat;
    const auto copy = [](const at::Tensor& x, at::ScalarType type) {
      return x.detach().to(type, /*non_blocking=*/false, /*copy=*/true);
    };
    return {copy(q, dtype), copy(k, dtype),    copy(v, dtype),
            copy(g, gates), copy(beta, gates), copy(initial_state, gates)};
  }
  /// Tokens [begin, end) and the sequences [first, last).
  GatedDeltaRuleTensors slice(int64_t begin, int64_t end, int64_t first, int64_t last) const {
    const auto tokens = [&](const at::Tensor& x) { return x.slice(1, begin, end); };
    return {tokens(q), tokens(k),    tokens(v),
            tokens(g), tokens(beta), initial_state.slice(0, first, last)};
  }
};

/// Keys are of about unit length, as a layer's are: longer ones make the recurrence unstable.
inline GatedDeltaRuleTensors random_tensors(const GatedDeltaRuleShape& s) {
  auto generator = at::make_generator<at::CPUGeneratorImpl>(s.seed);
  const auto gates = s.dtype == at::kDouble ? at::kDouble : at::kFloat;
  const auto normal = [&](at::IntArrayRef sizes, at::ScalarType dtype) {
    return at::randn(sizes, generator, at::kDouble).to(dtype);
  };
  const auto uniform = [&](double low, double high) {
    return (at::rand({s.B, s.T, s.HV}, generator, at::kDouble) * (high - low) + low).to(gates);
  };
  const double key_scale = 1 / std::sqrt(static_cast<double>(s.K));
  GatedDeltaRuleTensors x;
  x.q = normal({s.B, s.T, s.H, s.K}, s.dtype);
  x.k = (normal({s.B, s.T, s.H, s.K}, at::kDouble) * key_scale).to(s.dtype);
  x.v = normal({s.B, s.T, s.HV, s.V}, s.dtype);
  x.g = uniform(s.min_g, 0);
  x.beta = uniform(0, s.max_beta);
  x.initial_state = normal({s.N == 0 ? s.B : s.N, s.HV, s.K, s.V}, gates);
  return x;
}

using GatedDeltaRuleOp = std::tuple<at::Tensor, std::optional<at::Tensor>> (*)(
    const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
    const GatedDeltaRuleOptions&);

struct GatedDeltaRuleOutputs {
  at::Tensor o, final_state;
};

/// op on x, with x's initial state and with the final state.
inline GatedDeltaRuleOutputs call_op(GatedDeltaRuleOp op, const GatedDeltaRuleTensors& x,
                                     GatedDeltaRuleOptions options = {}) {
  options.initial_state = x.initial_state;
  options.output_final_state = true;
  auto [o, final_state] = op(x.q, x.k, x.v, x.g, x.beta, options);
  return {o, final_state.value()};
}

/// The recurrence, in the dtype of g: what a user would write first. Rounds o to v's dtype.
inline GatedDeltaRuleOutputs plain_gated_delta_rule(const GatedDeltaRuleTensors& x,
                                                    const GatedDeltaRuleOptions& options = {}) {
  const int64_t group = x.v.size(2) / x.q.size(2);
  const auto prepare = [&](const at::Tensor& tensor) {
    at::Tensor result = tensor.to(x.g.scalar_type());
    if (options.use_qk_l2norm_in_kernel) {
      result = result * (result * result).sum(-1, true).add(1e-6).rsqrt();
    }
    return result.repeat_interleave(group, 2);
  };
  const at::Tensor q = prepare(x.q);
  const at::Tensor k = prepare(x.k);
  const at::Tensor v = x.v.to(x.g.scalar_type());
  const double scale = options.scale.value_or(1 / std::sqrt(static_cast<double>(q.size(3))));
  at::Tensor S = x.initial_state;  // [B, HV, K, V]
  std::vector<at::Tensor> outputs;
  for (int64_t t = 0; t < q.size(1); ++t) {
    S = x.g.select(1, t).exp().unsqueeze(-1).unsqueeze(-1) * S;
    const at::Tensor k_t = k.select(1, t).unsqueeze(-1);  // [B, HV, K, 1]
    const at::Tensor error = v.select(1, t).unsqueeze(-2) - (S * k_t).sum(-2, true);
    S = S + k_t * (x.beta.select(1, t).unsqueeze(-1).unsqueeze(-1) * error);  // [B, HV, K, V]
    outputs.push_back(scale * (S * q.select(1, t).unsqueeze(-1)).sum(-2));    // [B, HV, V]
  }
  const at::Tensor o = outputs.empty() ? at::zeros_like(v) : at::stack(outputs, 1);
  return {o.to(x.v.scalar_type()), S};
}

/// Random gradients of the outputs for x.
inline GatedDeltaRuleOutputs random_output_gradients(const GatedDeltaRuleTensors& x) {
  auto generator = at::make_generator<at::CPUGeneratorImpl>(1);
  const at::Tensor o = at::randn(x.v.sizes(), generator, at::kDouble);
  const at::Tensor state = at::randn(x.initial_state.sizes(), generator, at::kDouble);
  return {o.to(x.v.scalar_type()), state.to(x.initial_state.scalar_type())};
}

/// Outputs and the gradients of every input by name, given those of the outputs.
template <typename Function>
std::map<std::string, at::Tensor> outputs_and_gradients(const Function& function,
                                                        GatedDeltaRuleTensors x,
                                                        const GatedDeltaRuleOutputs& d) {
  for (auto& [name, tensor] : x.by_name()) *tensor = tensor->detach().requires_grad_();
  const GatedDeltaRuleOutputs y = function(x);
  torch::autograd::backward({y.o, y.final_state}, {d.o.to(y.o.scalar_type()),
                                                   d.final_state.to(y.final_state.scalar_type())});
  std::map<std::string, at::Tensor> results = {{"o", y.o.detach()},
                                               {"final_state", y.final_state.detach()}};
  for (auto& [name, tensor] : x.by_name()) results["d_" + name] = tensor->grad();
  return results;
}

}  // namespace gdn::test
