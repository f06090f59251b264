// The gate of the gated delta rule: reference and SIMD kernels.
#include <support/kernel.h>

#include <gtest/gtest.h>

#include <gdn/kernels/cpu/gate.h>
#include <gdn/kernels/reference/gate.h>

namespace gdn::test {
namespace {

using namespace kernels;  // NOLINT(google-build-using-namespace)

/// Inputs a, A_log and dt_bias.
struct Gate {
  int64_t M, HV;

  Buffers inputs(DType dtype) const {
    const DType parameters = reference::statistics_dtype(dtype);
    return {Buffer::random(dtype, M * HV, 1), Buffer::random(parameters, HV, 2),
            Buffer::random(parameters, HV, 3)};
  }

  void fill(GateProblem& p, const Buffers& inputs, ParallelFor parallel_for) const {
    p.M = M;
    p.HV = HV;
    p.dtype = inputs[0].dtype();
    p.a = inputs[0].data();
    p.A_log = inputs[1].data();
    p.dt_bias = inputs[2].data();
    p.parallel_for = parallel_for;
  }

  Buffers forward(const Buffers& inputs, Implementation implementation,
                  ParallelFor parallel_for) const {
    Buffers outputs = {Buffer(inputs[1].dtype(), M * HV)};
    GateForward p;
    fill(p, inputs, parallel_for);
    p.g = outputs[0].data();
    implementation == Implementation::simd ? cpu::gate(p) : reference::gate<double>(p);
    return outputs;
  }

  Buffers backward(const Buffers& inputs, const Buffers& d_outputs, Implementation implementation,
                   ParallelFor parallel_for) const {
    Buffers gradients = {Buffer(inputs[0].dtype(), M * HV), Buffer(inputs[1].dtype(), HV),
                         Buffer(inputs[1].dtype(), HV)};
    GateBackward p;
    fill(p, inputs, parallel_for);
    p.d_g = d_outputs[0].data();
    p.d_a = gradients[0].data();
    p.d_A_log = gradients[1].data();
    p.d_dt_bias = gradients[2].data();
    implementation == Implementation::simd ? cpu::gate_backward(p)
                                           : reference::gate_backward<double>(p);
    return gradients;
  }

  // exp and log1p count for two each; the parameters' gradients are sums over M tokens.
  double roundings() const { return 12 + 2 * std::sqrt(static_cast<double>(M)); }
};

TEST(GateKernel, GradientsMatchFiniteDifferences) {
  expect_reference_gradients(Gate{.M = 4, .HV = 3});
}

TEST(GateKernel, SimdMatchesReference) {
  for (const int64_t HV : {1, 3, 6, 16, 33, 300}) {
    SCOPED_TRACE("HV " + std::to_string(HV));
    for (const int64_t M : {1, 70}) expect_simd_matches(Gate{.M = M, .HV = HV});
  }
}

TEST(GateKernel, ThreadsDoNotChangeBits) { expect_threads_agree(Gate{.M = 9973, .HV = 6}); }

TEST(GateKernel, TheDecayOfExtremeInputsIsFinite) {
  Buffer a(DType::f32, 4);
  a.set(0, -200);  // softplus underflows: no decay
  a.set(1, 200);   // softplus(x) = x where exp(x) overflows
  a.set(2, 0);
  a.set(3, std::numeric_limits<double>::quiet_NaN());
  Buffer zero(DType::f32, 1);
  zero.set(0, 0);
  const Buffer g =
      Gate{.M = 4, .HV = 1}.forward({a, zero, zero}, Implementation::simd, serial_for)[0];
  EXPECT_EQ(g[0], 0);
  EXPECT_EQ(g[1], -200);
  EXPECT_NEAR(g[2], -std::log(2.0), 1e-7);
  EXPECT_TRUE(std::isnan(g[3]));
}

}  // namespace
}  // namespace gdn::test
