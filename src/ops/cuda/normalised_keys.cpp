#include <ATen/ops/empty.h>

#include <gdn/kernels/cuda/norm.h>
#include <gdn/ops/cuda/normalised_keys.h>

namespace gdn::cuda {
namespace {

using kernels::ConstView4;
using kernels::GatedDeltaRuleProblem;

constexpr int64_t kBytes = 2;  // an element; no fp32 kernel takes normalised keys

/// Calls f(problem of the norm, its x's first element and stride, offset and stride of the same
/// rows in a contiguous tensor) for runs of rows of one stride: all of them where heads and tokens
/// follow one another, else head by head.
template <typename Norm, typename Function>
void for_each_run(const GatedDeltaRuleProblem& p, const ConstView4& x, const Function& f) {
  if (p.B * p.T * p.H == 0) return;
  const bool tokens_follow = x.stride_t == p.H * x.stride_h;
  const bool all_follow = tokens_follow && (p.B == 1 || x.stride_b == p.T * x.stride_t);
  const int64_t batches = all_follow ? 1 : p.B, heads = tokens_follow ? 1 : p.H;
  Norm norm;
  norm.M = p.B * p.T * p.H / (batches * heads);
  norm.D = p.K;
  norm.kind = kernels::NormKind::l2;
  norm.eps = 1e-6;
  norm.dtype = p.dtype;
  for (int64_t b = 0; b < batches; ++b) {
    for (int64_t h = 0; h < heads; ++h) {
      norm.x = {static_cast<const char*>(x.data) + kBytes * (b * x.stride_b + h * x.stride_h),
                tokens_follow ? x.stride_h : x.stride_t};
      f(norm, kBytes * (b * p.T * p.H + h) * p.K, tokens_follow ? p.K : p.H * p.K);
    }
  }
}

at::Tensor normalised(const GatedDeltaRuleProblem& p, const ConstView4& x, c10::Device device,
                      kernels::cuda::Stream stream) {
  const auto dtype = p.dtype == kernels::DType::bf16 ? at::kBFloat16 : at::kHalf;
  at::Tensor y = at::empty({p.B, p.T, p.H, p.K}, at::TensorOptions().dtype(dtype).device(device));
  for_each_run<kernels::NormForward>(
      p, x, [&](kernels::NormForward& norm, int64_t offset, int64_t stride) {
        norm.y = {static_cast<char*>(y.mutable_data_ptr()) + offset, stride};
        kernels::cuda::norm(norm, stream);
      });
  return y;
}

void through_norm(const GatedDeltaRuleProblem& p, const ConstView4& x,
                  const kernels::MutableView4& d, kernels::cuda::Stream stream) {
  for_each_run<kernels::NormBackward>(
      p, x, [&](kernels::NormBackward& norm, int64_t offset, int64_t stride) {
        norm.d_x = {static_cast<char*>(d.data) + offset, stride};
        norm.d_y = {norm.d_x.data, stride};
        kernels::cuda::norm_backward(norm, /*scratch=*/nullptr, stream);
      });
}

}  // namespace

NormalisedKeys::NormalisedKeys(const GatedDeltaRuleProblem& p, c10::Device device,
                               kernels::cuda::Stream stream)
    : q_(normalised(p, p.q, device, stream)), k_(normalised(p, p.k, device, stream)) {}

void NormalisedKeys::replace(GatedDeltaRuleProblem& p) const {
  p.qk_l2norm = false;
  p.q = {q_.const_data_ptr(), q_.stride(0), q_.stride(1), q_.stride(2)};
  p.k = {k_.const_data_ptr(), k_.stride(0), k_.stride(1), k_.stride(2)};
}

void through_key_norm(const kernels::GatedDeltaRuleBackward& p, kernels::cuda::Stream stream) {
  through_norm(p, p.q, p.d_q, stream);
  through_norm(p, p.k, p.d_k, stream);
}

}  // namespace gdn::cuda
