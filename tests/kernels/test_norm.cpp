// RMSNorm, gated RMSNorm and L2 norm: reference and SIMD kernels.
#include <support/kernel.h>

#include <gtest/gtest.h>

#include <gdn/kernels/cpu/norm.h>
#include <gdn/kernels/reference/norm.h>

namespace gdn::test {
namespace {

using namespace kernels;  // NOLINT(google-build-using-namespace)

/// Inputs x, weight, and with `gated` gate. Rows are kGap apart, so that a kernel that touches what
/// lies between them is caught.
struct Norm {
  static constexpr int64_t kGap = 3;
  int64_t M, D;
  NormKind kind = NormKind::rms;
  bool gated = false;
  bool fp32_weight = false;

  int64_t stride() const { return D + kGap; }

  Buffers inputs(DType dtype) const {
    const DType weight_dtype = fp32_weight && dtype != DType::f64 ? DType::f32 : dtype;
    Buffers inputs = {Buffer::random(dtype, M, D, stride(), 1), Buffer::random(weight_dtype, D, 2)};
    if (gated) inputs.push_back(Buffer::random(dtype, M, D, stride(), 3));
    return inputs;
  }

  void fill(NormProblem& p, const Buffers& inputs, ParallelFor parallel_for) const {
    p.M = M;
    p.D = D;
    p.kind = kind;
    p.eps = 1e-5;
    p.dtype = inputs[0].dtype();
    p.weight_dtype = inputs[1].dtype();
    p.x = {inputs[0].data(), stride()};
    p.weight = inputs[1].data();
    if (gated) p.gate = {inputs[2].data(), stride()};
    p.parallel_for = parallel_for;
  }

  Buffers forward(const Buffers& inputs, Implementation implementation,
                  ParallelFor parallel_for) const {
    const bool simd = implementation == Implementation::simd;
    return forward_rows<NormForward>(*this, inputs, parallel_for,
                                     simd ? cpu::norm : reference::norm<double>);
  }

  Buffers backward(const Buffers& inputs, const Buffers& d_outputs, Implementation implementation,
                   ParallelFor parallel_for) const {
    const DType dtype = inputs[0].dtype();
    Buffers gradients = {Buffer(dtype, M * stride()),
                         Buffer(reference::statistics_dtype(dtype), D)};
    if (gated) gradients.emplace_back(dtype, M * stride());
    NormBackward p;
    fill(p, inputs, parallel_for);
    p.d_y = {d_outputs[0].data(), stride()};
    p.d_x = {gradients[0].data(), stride()};
    p.d_weight = gradients[1].data();
    if (gated) p.d_gate = {gradients[2].data(), stride()};
    implementation == Implementation::simd ? cpu::norm_backward(p)
                                           : reference::norm_backward<double>(p);
    return gradients;
  }

  // A sum of D positive terms, and of M in d_weight; rounding errors add up as a random walk.
  double roundings() const { return 12 + 2 * std::sqrt(static_cast<double>(D + M)); }
};

TEST(NormKernel, GradientsMatchFiniteDifferences) {
  for (const int64_t D : {1, 2, 5}) {
    expect_reference_gradients(Norm{.M = 3, .D = D});
    expect_reference_gradients(Norm{.M = 3, .D = D, .kind = NormKind::l2});
    expect_reference_gradients(Norm{.M = 3, .D = D, .gated = true});
  }
}

TEST(NormKernel, SimdMatchesReference) {
  for (const int64_t D : {2, 3, 15, 16, 17, 33, 64, 130}) {
    SCOPED_TRACE("D " + std::to_string(D));
    expect_simd_matches(Norm{.M = 5, .D = D});
    expect_simd_matches(Norm{.M = 5, .D = D, .kind = NormKind::l2});
    expect_simd_matches(Norm{.M = 5, .D = D, .gated = true, .fp32_weight = true});
  }
  expect_simd_matches(Norm{.M = 700, .D = 40, .gated = true});
}

TEST(NormKernel, ThreadsDoNotChangeBits) {
  expect_threads_agree(Norm{.M = 997, .D = 65, .gated = true});
  expect_threads_agree(Norm{.M = 3, .D = 20000});
}

TEST(NormKernel, RowsDoNotSeeTheirNeighbours) {
  const Norm all = {.M = 7, .D = 19};
  const Norm one = {.M = 1, .D = 19};
  const Buffers inputs = all.inputs(DType::f32);
  const Buffer y = all.forward(inputs, Implementation::simd, serial_for)[0];
  for (int64_t m = 0; m < all.M; ++m) {
    Buffer row(DType::f32, all.stride());
    for (int64_t i = 0; i < all.D; ++i) row.set(i, inputs[0][m * all.stride() + i]);
    const Buffer alone = one.forward({row, inputs[1]}, Implementation::simd, serial_for)[0];
    for (int64_t i = 0; i < all.D; ++i) ASSERT_EQ(alone[i], y[m * all.stride() + i]) << m;
  }
}

}  // namespace
}  // namespace gdn::test
