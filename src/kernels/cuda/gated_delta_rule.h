// The gated delta rule on NVIDIA GPUs; stream.h says what all kernels here have in common.
#pragma once

#include <cstddef>
#include <string>

#include <gdn/kernels/cuda/stream.h>
#include <gdn/kernels/gated_delta_rule.h>

namespace gdn::kernels::cuda {

/// Largest K that the portable kernels take; V may be any.
inline constexpr int64_t kMaxKeySize = 512;

/// Token by token, the state in registers: one read and one write of it for all tokens. Works in
/// place when final_state is initial_state. Does not fill segment_states. Any V, K to kMaxKeySize.
void recurrent_gated_delta_rule(const GatedDeltaRuleForward& p, Stream stream);

/// Chunked forward for any compute capability from 7.5: any V, K to kMaxKeySize, fp32, bf16, fp16.
/// Chunks are of 64 tokens, whatever p.chunk_size says. `longest` is the number of tokens of the
/// longest sequence, which the host cannot read from p.cu_seqlens.
void chunk_gated_delta_rule(const GatedDeltaRuleForward& p, int64_t longest, void* scratch,
                            Stream stream);
int64_t chunk_gated_delta_rule_scratch(const GatedDeltaRuleForward& p, int64_t longest);

/// Its backward. Requires p.segment_states. Every gradient is written, none is read.
void chunk_gated_delta_rule_backward(const GatedDeltaRuleBackward& p, int64_t longest,
                                     void* scratch, Stream stream);
int64_t chunk_gated_delta_rule_backward_scratch(const GatedDeltaRuleBackward& p, int64_t longest);

/// Why the kernel for compute capability 9.0 (Hopper) cannot serve this request; empty if it can.
std::string why_not_sm90(const GatedDeltaRuleForward& p);

/// Bytes of scratch memory that the forward for compute capability 9.0 needs: none where sequences
/// and heads fill the device, else at least 16 KB for every chunk of every value head. `longest` is
/// the number of tokens of the longest sequence, which the host cannot read from p.cu_seqlens; it
/// decides how the work is divided, not what is computed.
size_t gated_delta_rule_forward_sm90_scratch(const GatedDeltaRuleForward& p, int64_t longest);

/// Chunked forward for compute capability 9.0: bf16 or fp16, K and V multiples of 8, K up to 128,
/// chunks of 64; the same bits on every run. It costs what K = 128 and V a multiple of 64 or 128
/// cost. `scratch`, device memory aligned to 128 bytes, is used until the queued work
/// is done. Throws std::invalid_argument with why_not_sm90's reason, std::runtime_error on a CUDA
/// error.
void gated_delta_rule_forward_sm90(const GatedDeltaRuleForward& p, int64_t longest, void* scratch,
                                   Stream stream);

/// Why the kernels for wide heads on compute capability 9.0 cannot serve this request; empty if
/// they can.
std::string why_not_sm90_wide(const GatedDeltaRuleForward& p);

/// Bytes of scratch memory that the forward for wide heads needs: 16 KB for every chunk of every
/// value head. Of cu_seqlens only its length counts.
size_t gated_delta_rule_forward_sm90_wide_scratch(const GatedDeltaRuleForward& p);

/// Chunked forward for compute capability 9.0: bf16 or fp16, K a multiple of 8 up to 256, V a
/// multiple of 8, chunks of 64; K = 256 is what it is made for. `scratch`, device memory aligned to
/// 128 bytes, is used until the queued work is done. Throws as gated_delta_rule_forward_sm90 does.
void gated_delta_rule_forward_sm90_wide(const GatedDeltaRuleForward& p, void* scratch,
                                        Stream stream);

/// The same for the backward. Besides, it requires the forward's segment_states.
std::string why_not_sm90(const GatedDeltaRuleBackward& p);

/// The backwards for compute capability 9.0 work in waves of heads and of windows of the sequences,
/// so that scratch memory stays below these where that is possible. Waves cost a few percent, and
/// heads of 128 need less memory for their scratch than wide ones.
inline constexpr size_t kBackwardScratchGoal = size_t{2} << 30;
inline constexpr size_t kWideBackwardScratchGoal = size_t{640} << 20;

/// Bytes of scratch memory that the backward for compute capability 9.0 needs: 96 KB for every
/// chunk of every value head of a wave. `longest` as above.
size_t gated_delta_rule_backward_sm90_scratch(const GatedDeltaRuleBackward& p, int64_t longest,
                                              size_t scratch_goal = kBackwardScratchGoal);

/// Chunked backward for compute capability 9.0: as the forward, K = V = 128; the same bits on every
/// run. `scratch`, device memory aligned to 128 bytes, is used until the queued work is done.
/// Throws as the forward does.
void gated_delta_rule_backward_sm90(const GatedDeltaRuleBackward& p, int64_t longest, void* scratch,
                                    Stream stream, size_t scratch_goal = kBackwardScratchGoal);

/// The same for the backward of wide heads; like the other backward it requires the forward's
/// segment_states.
std::string why_not_sm90_wide(const GatedDeltaRuleBackward& p);

/// Bytes of scratch memory that it needs: for every chunk of every value head of a wave 19 KB, and
/// 72 KB for every 64 of V; with several value heads a key head 96 KB a multiprocessor more.
size_t gated_delta_rule_backward_sm90_wide_scratch(const GatedDeltaRuleBackward& p, int64_t longest,
                                                   size_t scratch_goal = kWideBackwardScratchGoal);

/// Chunked backward for compute capability 9.0 of the heads that gated_delta_rule_forward_sm90_wide
/// serves; the same bits on every run. `scratch` as there. Throws as the forward does.
void gated_delta_rule_backward_sm90_wide(const GatedDeltaRuleBackward& p, int64_t longest,
                                         void* scratch, Stream stream,
                                         size_t scratch_goal = kWideBackwardScratchGoal);

}  // namespace gdn::kernels::cuda
