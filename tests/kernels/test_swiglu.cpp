// SwiGLU: reference and SIMD kernels.
#include <support/kernel.h>

#include <gtest/gtest.h>

#include <gdn/kernels/cpu/swiglu.h>
#include <gdn/kernels/reference/swiglu.h>

namespace gdn::test {
namespace {

using namespace kernels;  // NOLINT(google-build-using-namespace)

/// Inputs gate and up, as the halves of one matrix are: rows 2 D apart.
struct Swiglu {
  int64_t M, D;

  int64_t stride() const { return 2 * D; }

  Buffers inputs(DType dtype) const {
    return {Buffer::random(dtype, M, D, stride(), 1), Buffer::random(dtype, M, D, stride(), 2)};
  }

  void fill(SwigluProblem& p, const Buffers& inputs, ParallelFor parallel_for) const {
    p.M = M;
    p.D = D;
    p.dtype = inputs[0].dtype();
    p.gate = {inputs[0].data(), stride()};
    p.up = {inputs[1].data(), stride()};
    p.parallel_for = parallel_for;
  }

  Buffers forward(const Buffers& inputs, Implementation implementation,
                  ParallelFor parallel_for) const {
    const bool simd = implementation == Implementation::simd;
    return forward_rows<SwigluForward>(*this, inputs, parallel_for,
                                       simd ? cpu::swiglu : reference::swiglu<double>);
  }

  Buffers backward(const Buffers& inputs, const Buffers& d_outputs, Implementation implementation,
                   ParallelFor parallel_for) const {
    Buffers gradients(2, Buffer(inputs[0].dtype(), M * stride()));
    SwigluBackward p;
    fill(p, inputs, parallel_for);
    p.d_y = {d_outputs[0].data(), stride()};
    p.d_gate = {gradients[0].data(), stride()};
    p.d_up = {gradients[1].data(), stride()};
    implementation == Implementation::simd ? cpu::swiglu_backward(p)
                                           : reference::swiglu_backward<double>(p);
    return gradients;
  }

  double roundings() const { return 12; }  // exp counts for two, then one an operation
};

TEST(SwigluKernel, GradientsMatchFiniteDifferences) {
  expect_reference_gradients(Swiglu{.M = 2, .D = 5});
}

TEST(SwigluKernel, SimdMatchesReference) {
  for (const int64_t D : {1, 3, 15, 16, 17, 33, 130}) {
    SCOPED_TRACE("D " + std::to_string(D));
    expect_simd_matches(Swiglu{.M = 4, .D = D});
  }
}

TEST(SwigluKernel, ThreadsDoNotChangeBits) { expect_threads_agree(Swiglu{.M = 997, .D = 65}); }

}  // namespace
}  // namespace gdn::test
