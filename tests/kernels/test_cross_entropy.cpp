// Cross-entropy: reference and SIMD kernels.
#include <support/kernel.h>

#include <gtest/gtest.h>

#include <gdn/kernels/cpu/cross_entropy.h>
#include <gdn/kernels/reference/cross_entropy.h>

namespace gdn::test {
namespace {

using namespace kernels;  // NOLINT(google-build-using-namespace)

/// Input logits; output the losses. Every third row is ignored.
struct CrossEntropy {
  static constexpr int64_t kGap = 5;
  static constexpr int64_t kIgnored = -100;
  int64_t M, vocabulary;
  std::vector<int64_t> target;

  CrossEntropy(int64_t M, int64_t vocabulary) : M(M), vocabulary(vocabulary) {
    for (int64_t m = 0; m < M; ++m) {
      target.push_back(m % 3 == 1 ? kIgnored : m * 7919 % vocabulary);
    }
  }

  int64_t stride() const { return vocabulary + kGap; }

  Buffers inputs(DType dtype) const { return {Buffer::random(dtype, M, vocabulary, stride(), 1)}; }

  void fill(CrossEntropyProblem& p, const Buffers& inputs, ParallelFor parallel_for) const {
    p.M = M;
    p.vocabulary = vocabulary;
    p.ignore_index = kIgnored;
    p.dtype = inputs[0].dtype();
    p.logits = {inputs[0].data(), stride()};
    p.target = target.data();
    p.parallel_for = parallel_for;
  }

  Buffers run(const Buffers& inputs, Implementation implementation,
              ParallelFor parallel_for) const {
    const DType statistics = reference::statistics_dtype(inputs[0].dtype());
    Buffers outputs(2, Buffer(statistics, M));
    CrossEntropyForward p;
    fill(p, inputs, parallel_for);
    p.loss = outputs[0].data();
    p.log_sum_exp = outputs[1].data();
    implementation == Implementation::simd ? cpu::cross_entropy(p)
                                           : reference::cross_entropy<double>(p);
    return outputs;
  }

  Buffers forward(const Buffers& inputs, Implementation implementation,
                  ParallelFor parallel_for) const {
    return {run(inputs, implementation, parallel_for)[0]};
  }

  Buffers backward(const Buffers& inputs, const Buffers& d_outputs, Implementation implementation,
                   ParallelFor parallel_for) const {
    const Buffer log_sum_exp = run(inputs, implementation, parallel_for)[1];
    Buffers gradients = {Buffer(inputs[0].dtype(), inputs[0].size())};
    CrossEntropyBackward p;
    fill(p, inputs, parallel_for);
    p.log_sum_exp = log_sum_exp.data();
    p.d_loss = d_outputs[0].data();
    p.d_logits = {gradients[0].data(), stride()};
    implementation == Implementation::simd ? cpu::cross_entropy_backward(p)
                                           : reference::cross_entropy_backward<double>(p);
    return gradients;
  }

  // The sum's roundings, and those of logits - log_sum_exp, a number of up to 20 whose absolute
  // error becomes the relative one of its exponential.
  double roundings() const { return 30 + 2 * std::sqrt(static_cast<double>(vocabulary)); }
};

TEST(CrossEntropyKernel, GradientsMatchFiniteDifferences) {
  expect_reference_gradients(CrossEntropy(4, 5));
}

TEST(CrossEntropyKernel, SimdMatchesReference) {
  for (const int64_t vocabulary : {1, 2, 15, 16, 17, 33, 1000}) {
    SCOPED_TRACE("vocabulary " + std::to_string(vocabulary));
    expect_simd_matches(CrossEntropy(7, vocabulary));
  }
}

TEST(CrossEntropyKernel, ThreadsDoNotChangeBits) { expect_threads_agree(CrossEntropy(301, 517)); }

TEST(CrossEntropyKernel, LargeLogitsDoNotOverflow) {
  const CrossEntropy kernel(1, 21);
  Buffers inputs = kernel.inputs(DType::f32);
  for (int64_t i = 0; i < 21; ++i) inputs[0].set(i, i == 0 ? 3e38 : -3e38);
  for_each_target(
      [&] { EXPECT_EQ(kernel.forward(inputs, Implementation::simd, serial_for)[0][0], 0); });
}

TEST(CrossEntropyKernel, NaNIsSeenAndIgnoredRowsAreNot) {
  CrossEntropy kernel(2, 37);
  Buffers inputs = kernel.inputs(DType::f32);
  for (int64_t i = 0; i < 2; ++i) {
    inputs[0].set(i * kernel.stride() + 20, std::numeric_limits<double>::quiet_NaN());
  }
  for_each_target([&] {
    const Buffer loss = kernel.forward(inputs, Implementation::simd, serial_for)[0];
    EXPECT_TRUE(std::isnan(loss[0]));
    EXPECT_EQ(loss[1], 0);
    Buffer d_loss(DType::f32, 2);
    d_loss.set(0, 1);
    d_loss.set(1, 1);
    const Buffer d_logits = kernel.backward(inputs, {d_loss}, Implementation::simd, serial_for)[0];
    EXPECT_TRUE(std::isnan(d_logits[3]));
    for (int64_t i = 0; i < 37; ++i) EXPECT_EQ(d_logits[kernel.stride() + i], 0);
  });
}

TEST(CrossEntropyKernel, WorksInPlace) {
  const CrossEntropy kernel(5, 70);
  const Buffers inputs = kernel.inputs(DType::bf16);
  const Buffers outputs = kernel.run(inputs, Implementation::simd, serial_for);
  const Buffer d_loss = Buffer::random(DType::f32, 5, 4);
  const Buffer want = kernel.backward(inputs, {d_loss}, Implementation::simd, serial_for)[0];
  Buffers logits = inputs;
  CrossEntropyBackward p;
  kernel.fill(p, logits, serial_for);
  p.log_sum_exp = outputs[1].data();
  p.d_loss = d_loss.data();
  p.d_logits = {logits[0].data(), kernel.stride()};
  cpu::cross_entropy_backward(p);
  for (int64_t m = 0; m < 5; ++m) {
    for (int64_t i = 0; i < 70; ++i) {
      ASSERT_EQ(logits[0][m * kernel.stride() + i], want[m * kernel.stride() + i]) << m << " " << i;
    }
  }
}

}  // namespace
}  // namespace gdn::test
