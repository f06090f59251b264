// Which kernel serves which request on the CPU. Those on CUDA are made in kernels/cuda/choice.h.
#pragma once

#include <string>
#include <string_view>

#include <c10/core/ScalarType.h>

#include <gdn/kernels/gated_delta_rule.h>

namespace gdn {

/// What is asked of a kernel. The recurrent form has no backward of its own: the chunked one
/// computes the same gradients.
enum class GatedDeltaRulePass { chunk_forward, recurrent_forward, backward };

/// A kernel, and why it was chosen. `forward` is set for the forward passes, else `backward`.
struct KernelChoice {
  std::string name;
  std::string_view reason;
  void (*forward)(const kernels::GatedDeltaRuleForward&) = nullptr;
  void (*backward)(const kernels::GatedDeltaRuleBackward&) = nullptr;
};

/// The kernel for tensors of `dtype` (fp32, bf16, fp16 or fp64) on the CPU.
KernelChoice choose_kernel(GatedDeltaRulePass pass, c10::ScalarType dtype);

/// Whether the backward for `dtype` reads the segment states that a training forward keeps. The
/// reference kernels do not: they compute every state again.
inline bool keeps_segment_states(c10::ScalarType dtype) { return dtype != c10::kDouble; }

}  // namespace gdn
