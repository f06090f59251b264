// The short convolution: reference and SIMD kernels.
#include <support/kernel.h>

#include <gtest/gtest.h>

#include <gdn/kernels/cpu/short_convolution.h>
#include <gdn/kernels/reference/short_convolution.h>

namespace gdn::test {
namespace {

using namespace kernels;  // NOLINT(google-build-using-namespace)

/// Inputs x, weight, bias and initial state; outputs y and the final state. Tokens lie kGap
/// elements apart, so that a kernel that touches what lies between them is caught.
struct ShortConvolution {
  static constexpr int64_t kGap = 2;
  int64_t B, T, D, W;
  bool silu = true;
  std::vector<int64_t> cu_seqlens = {};

  int64_t stride() const { return D + kGap; }
  int64_t N() const { return cu_seqlens.empty() ? B : static_cast<int64_t>(cu_seqlens.size()) - 1; }

  Buffers inputs(DType dtype) const {
    return {Buffer::random(dtype, B * T, D, stride(), 1), Buffer::random(dtype, D * W, 2),
            Buffer::random(dtype, D, 3), Buffer::random(dtype, N() * D * (W - 1), 4)};
  }

  void fill(ShortConvolutionProblem& p, const Buffers& inputs, ParallelFor parallel_for) const {
    p.B = B;
    p.T = T;
    p.D = D;
    p.W = W;
    p.N = N();
    p.silu = silu;
    p.dtype = inputs[0].dtype();
    p.weight_dtype = inputs[1].dtype();
    p.cu_seqlens = cu_seqlens.empty() ? nullptr : cu_seqlens.data();
    p.x = {inputs[0].data(), T * stride(), stride()};
    p.weight = inputs[1].data();
    p.bias = inputs[2].data();
    p.initial_state = inputs[3].data();
    p.parallel_for = parallel_for;
  }

  Buffers forward(const Buffers& inputs, Implementation implementation,
                  ParallelFor parallel_for) const {
    Buffers outputs = {Buffer(inputs[0].dtype(), inputs[0].size()),
                       Buffer(inputs[0].dtype(), inputs[3].size())};
    ShortConvolutionForward p;
    fill(p, inputs, parallel_for);
    p.y = {outputs[0].data(), T * stride(), stride()};
    p.final_state = outputs[1].data();
    implementation == Implementation::simd ? cpu::short_convolution(p)
                                           : reference::short_convolution<double>(p);
    return outputs;
  }

  Buffers backward(const Buffers& inputs, const Buffers& d_outputs, Implementation implementation,
                   ParallelFor parallel_for) const {
    const DType dtype = inputs[0].dtype();
    const DType statistics = reference::statistics_dtype(dtype);
    Buffers gradients = {Buffer(dtype, inputs[0].size()), Buffer(statistics, D * W),
                         Buffer(statistics, D), Buffer(dtype, inputs[3].size())};
    ShortConvolutionBackward p;
    fill(p, inputs, parallel_for);
    p.d_y = {d_outputs[0].data(), T * stride(), stride()};
    p.d_final_state = d_outputs[1].data();
    p.d_x = {gradients[0].data(), T * stride(), stride()};
    p.d_weight = gradients[1].data();
    p.d_bias = gradients[2].data();
    p.d_initial_state = gradients[3].data();
    implementation == Implementation::simd ? cpu::short_convolution_backward(p)
                                           : reference::short_convolution_backward<double>(p);
    return gradients;
  }

  // W products and an exp each way; the parameters' gradients are sums over all tokens.
  double roundings() const { return 24 + 2 * std::sqrt(static_cast<double>(B * T)); }
};

TEST(ShortConvolutionKernel, GradientsMatchFiniteDifferences) {
  for (const bool silu : {false, true}) {
    for (const int64_t T : {1, 2, 3, 6}) {
      expect_reference_gradients(ShortConvolution{.B = 2, .T = T, .D = 2, .W = 4, .silu = silu});
    }
  }
  expect_reference_gradients(
      ShortConvolution{.B = 1, .T = 7, .D = 2, .W = 3, .cu_seqlens = {0, 1, 1, 7}});
}

TEST(ShortConvolutionKernel, SimdMatchesReference) {
  for (const int64_t W : {2, 3, 4, 8}) {
    for (const int64_t T : {0, 1, 3, 31, 32, 33, 70}) {
      for (const int64_t D : {3, 15, 17, 40}) {
        SCOPED_TRACE("W " + std::to_string(W) + ", T " + std::to_string(T) + ", D " +
                     std::to_string(D));
        expect_simd_matches(ShortConvolution{.B = 2, .T = T, .D = D, .W = W, .silu = D != 15});
      }
    }
  }
  expect_simd_matches(
      ShortConvolution{.B = 1, .T = 50, .D = 300, .W = 4, .cu_seqlens = {0, 0, 1, 3, 40, 50, 50}});
}

TEST(ShortConvolutionKernel, ThreadsDoNotChangeBits) {
  expect_threads_agree(ShortConvolution{.B = 3, .T = 400, .D = 520, .W = 4});
  expect_threads_agree(
      ShortConvolution{.B = 1, .T = 400, .D = 33, .W = 4, .cu_seqlens = {0, 5, 5, 300, 400}});
}

TEST(ShortConvolutionKernel, AbsentStatesAreZeros) {
  const ShortConvolution kernel = {.B = 2, .T = 40, .D = 21, .W = 4};
  Buffers inputs = kernel.inputs(DType::f32);
  for (int64_t i = 0; i < inputs[3].size(); ++i) inputs[3].set(i, 0);
  const Buffers want = kernel.forward(inputs, Implementation::simd, serial_for);
  Buffer y(DType::f32, inputs[0].size());
  ShortConvolutionForward p;
  kernel.fill(p, inputs, serial_for);
  p.initial_state = nullptr;
  p.y = {y.data(), kernel.T * kernel.stride(), kernel.stride()};
  cpu::short_convolution(p);
  EXPECT_TRUE(y.same_bytes(want[0]));
}

// Each sequence of a packed row gives the bits that it gives alone.
TEST(ShortConvolutionKernel, PackedIsSeparate) {
  const std::vector<int64_t> boundaries = {0, 2, 2, 35, 36, 80};
  const ShortConvolution packed = {.B = 1, .T = 80, .D = 19, .W = 4, .cu_seqlens = boundaries};
  const Buffers inputs = packed.inputs(DType::f32);
  const Buffers outputs = packed.forward(inputs, Implementation::simd, serial_for);
  const Buffers d_outputs = random_gradients(outputs);
  const Buffers gradients = packed.backward(inputs, d_outputs, Implementation::simd, serial_for);

  const auto slice = [](const Buffer& from, int64_t begin, int64_t end) {
    Buffer part(from.dtype(), end - begin);
    for (int64_t i = begin; i < end; ++i) part.set(i - begin, from[i]);
    return part;
  };
  const int64_t stride = packed.stride();
  const int64_t state = packed.D * (packed.W - 1);
  for (int64_t n = 0; n < packed.N(); ++n) {
    SCOPED_TRACE("sequence " + std::to_string(n));
    const int64_t begin = boundaries[n] * stride;
    const int64_t end = boundaries[n + 1] * stride;
    const auto tokens = [&](const Buffer& from) { return slice(from, begin, end); };
    const auto states = [&](const Buffer& from) { return slice(from, n * state, (n + 1) * state); };
    const ShortConvolution alone = {
        .B = 1, .T = boundaries[n + 1] - boundaries[n], .D = packed.D, .W = packed.W};
    const Buffers own = {tokens(inputs[0]), inputs[1], inputs[2], states(inputs[3])};
    const Buffers y = alone.forward(own, Implementation::simd, serial_for);
    EXPECT_TRUE(y[0].same_bytes(tokens(outputs[0])));
    EXPECT_TRUE(y[1].same_bytes(states(outputs[1])));
    const Buffers d = alone.backward(own, {tokens(d_outputs[0]), states(d_outputs[1])},
                                     Implementation::simd, serial_for);
    EXPECT_TRUE(d[0].same_bytes(tokens(gradients[0])));
    EXPECT_TRUE(d[3].same_bytes(states(gradients[3])));
  }
}

// A sequence cut anywhere, its state carried over in place, gives the bits of the whole.
TEST(ShortConvolutionKernel, PiecesInPlaceAreTheWhole) {
  const ShortConvolution whole = {.B = 1, .T = 75, .D = 18, .W = 4};
  const Buffers inputs = whole.inputs(DType::bf16);
  const Buffers want = whole.forward(inputs, Implementation::simd, serial_for);
  for (const int64_t piece : {1, 2, 5, 70}) {
    SCOPED_TRACE("pieces of " + std::to_string(piece));
    Buffers own = inputs;
    Buffer y(DType::bf16, inputs[0].size());
    for (int64_t t = 0; t < whole.T; t += piece) {
      const int64_t offset = t * whole.stride() * bytes_of(DType::bf16);
      ShortConvolutionForward p;
      whole.fill(p, own, serial_for);
      p.T = std::min(piece, whole.T - t);
      p.x.data = static_cast<const std::byte*>(own[0].data()) + offset;
      p.y = {static_cast<std::byte*>(y.data()) + offset, 0, whole.stride()};
      p.final_state = own[3].data();
      cpu::short_convolution(p);
    }
    EXPECT_TRUE(y.same_bytes(want[0]));
    EXPECT_TRUE(own[3].same_bytes(want[1]));
  }
}

}  // namespace
}  // namespace gdn::test
