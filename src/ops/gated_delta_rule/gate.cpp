// The gate of the gated delta rule, composed of torch's operators.
#include <ATen/ATen.h>

#include <gdn/ops/gated_delta_rule/gated_delta_rule.h>

namespace gdn {

at::Tensor gated_delta_rule_gate(const at::Tensor& a, const at::Tensor& A_log,
                                 const at::Tensor& dt_bias) {
  const at::ScalarType dtype = a.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  return -A_log.to(dtype).exp() * at::softplus(a.to(dtype) + dt_bias.to(dtype));
}

}  // namespace gdn
