// The gated delta rule on NVIDIA GPUs. Parameters are those of every kernel; here all pointers of a
// problem are device memory, cu_seqlens too, and the work is queued on a stream.
#pragma once

#include <cstddef>
#include <string>

#include <gdn/kernels/gated_delta_rule.h>

struct CUstream_st;

namespace gdn::kernels::cuda {

using Stream = CUstream_st*;

/// Why the kernel for compute capability 9.0 (Hopper) cannot serve this request; empty if it can.
std::string why_not_sm90(const GatedDeltaRuleForward& p);

/// Chunked forward for compute capability 9.0: bf16 or fp16, K = V = 128, chunks of 64. Throws
/// std::invalid_argument with why_not_sm90's reason, std::runtime_error on a CUDA error.
/// parallel_for is not used.
void gated_delta_rule_forward_sm90(const GatedDeltaRuleForward& p, Stream stream);

/// The same for the backward. Besides, it requires the forward's segment_states.
std::string why_not_sm90(const GatedDeltaRuleBackward& p);

/// Bytes of scratch memory that the backward for compute capability 9.0 needs: 96 KB for every
/// chunk of every value head. Of cu_seqlens only its length counts.
size_t gated_delta_rule_backward_sm90_scratch(const GatedDeltaRuleBackward& p);

/// Chunked backward for compute capability 9.0, for the same shapes as the forward; the same bits
/// on every run. `scratch`, device memory aligned to 128 bytes, is used until the queued work is
/// done. Throws as the forward does.
void gated_delta_rule_backward_sm90(const GatedDeltaRuleBackward& p, void* scratch, Stream stream);

}  // namespace gdn::kernels::cuda
