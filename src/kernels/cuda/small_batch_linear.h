// A linear map of few rows on NVIDIA GPUs, for decoding: it reads the weight once, at the memory's
// speed. stream.h says what all kernels here have in common.
#pragma once

#include <string>

#include <gdn/kernels/cuda/choice.h>
#include <gdn/kernels/cuda/stream.h>
#include <gdn/kernels/small_batch_linear.h>

namespace gdn::kernels::cuda {

/// Rows that the kernel takes: those of one tensor core instruction.
inline constexpr int64_t kMaxSmallBatch = 8;
/// Rows up to which each block computes a norm of groups for itself.
inline constexpr int64_t kMaxGroupNormRows = 2;

/// Why the kernel cannot serve a request on a GPU of this compute capability whose blocks can have
/// so much shared memory; empty if it can.
std::string why_not_small_batch_linear(const SmallBatchLinear& p, ComputeCapability capability,
                                       int64_t shared_bytes);

void small_batch_linear(const SmallBatchLinear& p, Stream stream);

}  // namespace gdn::kernels::cuda
