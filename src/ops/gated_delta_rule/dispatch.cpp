#include <gdn/kernels/cpu/gated_delta_rule.h>
#include <gdn/kernels/reference/gated_delta_rule.h>
#include <gdn/ops/gated_delta_rule/dispatch.h>

namespace gdn {

KernelChoice choose_kernel(GatedDeltaRulePass pass, c10::ScalarType dtype) {
  namespace cpu = kernels::cpu;
  namespace reference = kernels::reference;
  using Pass = GatedDeltaRulePass;
  KernelChoice choice;
  if (dtype == c10::kDouble) {
    choice.reason = "only the reference computes in fp64, which is for gradient checks";
    switch (pass) {
      case Pass::chunk_forward:
        choice.name = "reference::chunk_gated_delta_rule<double>";
        choice.forward = reference::chunk_gated_delta_rule<double>;
        break;
      case Pass::recurrent_forward:
        choice.name = "reference::recurrent_gated_delta_rule<double>";
        choice.forward = reference::recurrent_gated_delta_rule<double>;
        break;
      case Pass::backward:
        choice.name = "reference::chunk_gated_delta_rule_backward<double>";
        choice.backward = reference::chunk_gated_delta_rule_backward<double>;
        break;
    }
    return choice;
  }
  const std::string isa = std::string(" (") + cpu::instruction_set() + ")";
  choice.reason = "SIMD kernels serve fp32, bf16 and fp16 on the CPU";
  switch (pass) {
    case Pass::chunk_forward:
      choice.name = "cpu::chunk_gated_delta_rule" + isa;
      choice.forward = cpu::chunk_gated_delta_rule;
      break;
    case Pass::recurrent_forward:
      choice.name = "cpu::recurrent_gated_delta_rule" + isa;
      choice.forward = cpu::recurrent_gated_delta_rule;
      break;
    case Pass::backward:
      choice.name = "cpu::chunk_gated_delta_rule_backward" + isa;
      choice.backward = cpu::chunk_gated_delta_rule_backward;
      break;
  }
  return choice;
}

}  // namespace gdn
