// Gated delta rule on a CPU: SIMD through Highway, instruction set chosen at run time; fp32 inside.
#pragma once

#include <vector>

#include <gdn/kernels/gated_delta_rule.h>

namespace gdn::kernels::cpu {

/// Chunked forward. dtype f32, bf16 or f16; any K, V, T.
void chunk_gated_delta_rule(const GatedDeltaRuleForward& p);

/// Chunked backward. Requires p.segment_states. Every gradient is written, none is read.
void chunk_gated_delta_rule_backward(const GatedDeltaRuleBackward& p);

/// Token by token; the kernel for decoding. Reads and writes the state once a token, and works in
/// place when final_state is initial_state. Does not fill segment_states.
void recurrent_gated_delta_rule(const GatedDeltaRuleForward& p);

/// Name of the instruction set that these kernels run with on this machine, such as "AVX3".
const char* instruction_set();

/// Names of all that these kernels are compiled for, best first.
std::vector<const char*> compiled_instruction_sets();

}  // namespace gdn::kernels::cpu
