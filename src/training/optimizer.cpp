#include <cmath>

#include <ATen/core/grad_mode.h>
#include <ATen/ops/_foreach_add.h>
#include <ATen/ops/_foreach_mul.h>
#include <ATen/ops/_foreach_norm.h>
#include <ATen/ops/_fused_adamw.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <gdn/training/optimizer.h>

namespace gdn {

bool decays(const at::Tensor& parameter) { return parameter.dim() >= 2; }

AdamW::AdamW(const NamedTensors& parameters, const AdamWOptions& options) : options_(options) {
  for (const auto& [name, parameter] : parameters) {
    Group& group = group_of(parameter);
    group.names.push_back(name);
    group.parameters.push_back(parameter);
    group.exp_avgs.push_back(at::zeros_like(parameter));
    group.exp_avg_sqs.push_back(at::zeros_like(parameter));
    group.steps.push_back(at::zeros({}, parameter.options().dtype(at::kFloat)));
  }
}

AdamW::Group& AdamW::group_of(const at::Tensor& parameter) {
  const double weight_decay = decays(parameter) ? options_.weight_decay : 0;
  for (Group& group : groups_) {
    const at::Tensor& first = group.parameters.front();
    if (decays(first) == decays(parameter) && first.scalar_type() == parameter.scalar_type()) {
      return group;
    }
  }
  groups_.emplace_back().weight_decay = weight_decay;
  return groups_.back();
}

void AdamW::step(double lr) {
  const at::NoGradGuard no_grad;
  for (Group& group : groups_) {
    std::vector<at::Tensor> parameters, gradients, exp_avgs, exp_avg_sqs, steps;
    for (size_t i = 0; i < group.parameters.size(); ++i) {
      const at::Tensor& gradient = group.parameters[i].grad();
      if (!gradient.defined()) continue;
      parameters.push_back(group.parameters[i]);
      gradients.push_back(gradient);
      exp_avgs.push_back(group.exp_avgs[i]);
      exp_avg_sqs.push_back(group.exp_avg_sqs[i]);
      steps.push_back(group.steps[i]);
    }
    if (parameters.empty()) continue;
    at::_foreach_add_(steps, 1);
    at::_fused_adamw_(parameters, gradients, exp_avgs, exp_avg_sqs, {}, steps, lr, options_.beta1,
                      options_.beta2, group.weight_decay, options_.eps, /*amsgrad=*/false,
                      /*maximize=*/false);
  }
}

void AdamW::zero_grad() {
  for (Group& group : groups_) {
    for (at::Tensor& parameter : group.parameters) parameter.mutable_grad() = at::Tensor();
  }
}

double AdamW::clip_grad_norm(double max_norm) {
  const at::NoGradGuard no_grad;
  std::vector<std::vector<at::Tensor>> gradients;  // of one dtype each
  std::vector<at::Tensor> norms;
  for (const Group& group : groups_) {
    std::vector<at::Tensor>& all = gradients.emplace_back();
    for (const at::Tensor& parameter : group.parameters) {
      if (parameter.grad().defined()) all.push_back(parameter.grad());
    }
    if (all.empty()) continue;
    const auto wide = at::promote_types(all.front().scalar_type(), at::kFloat);
    for (const at::Tensor& norm : at::_foreach_norm(all, 2, wide)) norms.push_back(norm);
  }
  if (norms.empty()) return 0;
  const double norm = at::linalg_vector_norm(at::stack(norms)).item<double>();
  if (max_norm > 0 && std::isfinite(norm) && norm > max_norm) {
    for (std::vector<at::Tensor>& all : gradients) {
      if (!all.empty()) at::_foreach_mul_(all, max_norm / norm);
    }
  }
  return norm;
}

NamedTensors AdamW::state() const {
  NamedTensors state;
  for (const Group& group : groups_) {
    for (size_t i = 0; i < group.names.size(); ++i) {
      state.emplace_back("exp_avg." + group.names[i], group.exp_avgs[i]);
      state.emplace_back("exp_avg_sq." + group.names[i], group.exp_avg_sqs[i]);
      state.emplace_back("step." + group.names[i], group.steps[i]);
    }
  }
  return state;
}

}  // namespace gdn
