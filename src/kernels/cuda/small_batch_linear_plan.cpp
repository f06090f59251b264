#include <gdn/kernels/cuda/small_batch_linear.h>
#include <gdn/kernels/cuda/small_batch_linear_plan.h>

namespace gdn::kernels::cuda {

SmallBatchLinearPlan plan_small_batch_linear(const SmallBatchLinear& p) {
  using Norm = SmallBatchLinearPlan::Norm;
  constexpr int64_t kElement = 2;
  constexpr int kSliceUnit = kLinearStage * kLinearStep;
  constexpr int kWarpPieces = 32;
  const auto divide_up = [](int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); };
  SmallBatchLinearPlan plan;
  if (p.norm_weight != nullptr) {
    // Whole rows of which each sum of squares is a warp's. Their products with the weight need the
    // range of bf16: the factor comes later.
    const bool rows = p.norm_size == p.D && p.gate.data == nullptr && p.dtype == DType::bf16 &&
                      p.D % (int64_t{kWarpPieces} * kLinearPiece) == 0;
    plan.norm = rows ? Norm::rows : Norm::groups;
  }
  plan.tiles = divide_up(p.N, p.swiglu ? kLinearRows / 2 : kLinearRows);
  plan.stages = divide_up(p.D, int64_t{kLinearWarps} * kSliceUnit);
  plan.slice = plan.stages * kSliceUnit;
  // A step more than what lies in it: two rows then start on different banks.
  plan.stride = kLinearWarps * plan.slice + kLinearStep;
  const int64_t ring =
      int64_t{kLinearDepth} * kLinearStage * kLinearWarps * kLinearStep * kLinearRows * kElement;
  const int64_t sums = plan.norm == Norm::none ? 0 : p.M * p.D / kLinearPiece * 4;
  plan.shared_bytes = ring + p.M * plan.stride * kElement + sums;
  return plan;
}

std::string why_not_small_batch_linear(const SmallBatchLinear& p, ComputeCapability capability,
                                       int64_t shared_bytes) {
  if (capability.major < 8) {
    return "the GPU has compute capability " + std::to_string(capability.major) + "." +
           std::to_string(capability.minor) + ", 8.0 is needed";
  }
  if (p.dtype != DType::bf16 && p.dtype != DType::f16) return "the tensors are not bf16 or fp16";
  if (p.scales != nullptr) return "the weight is int8";
  if (p.M > kMaxSmallBatch) {
    return std::to_string(p.M) + " rows, more than " + std::to_string(kMaxSmallBatch);
  }
  const auto aligned = [](const void* data, int64_t stride) {
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride % kLinearPiece == 0;
  };
  const bool norm = p.norm_weight == nullptr || aligned(p.norm_weight, p.norm_size);
  if (!aligned(p.x.data, p.M > 1 ? p.x.stride : 0) || !aligned(p.weight, p.D) || !norm ||
      !aligned(p.gate.data, p.M > 1 ? p.gate.stride : 0)) {
    return "rows, or groups of the norm, do not start at multiples of 16 bytes";
  }
  if (p.taps > kLinearMaxTaps) {
    return std::to_string(p.taps) + " taps, more than " + std::to_string(kLinearMaxTaps);
  }
  constexpr int64_t kStatic = 4 << 10;  // of the kernel's shared memory: the sums' parts
  const SmallBatchLinearPlan plan = plan_small_batch_linear(p);
  if (kStatic + plan.shared_bytes > shared_bytes) {
    return std::to_string(p.M) + " rows of " + std::to_string(p.D) + " do not fit shared memory";
  }
  if (plan.norm == SmallBatchLinearPlan::Norm::groups && p.M > kMaxGroupNormRows) {
    return "a norm of groups of " + std::to_string(p.M) + " rows is faster on its own";
  }
  return {};
}

}  // namespace gdn::kernels::cuda
