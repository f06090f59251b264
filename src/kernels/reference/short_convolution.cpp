#include <vector>

#include <gdn/kernels/reference/element.h>
#include <gdn/kernels/reference/short_convolution.h>

namespace gdn::kernels::reference {
namespace {

/// One channel of one sequence: the W - 1 inputs before its first token, then its tokens.
template <typename Real>
std::vector<Real> inputs(const ShortConvolutionProblem& p, int64_t n, int64_t d) {
  const SequenceSpan span = sequence_span(p, n);
  std::vector<Real> x(p.W - 1 + span.length, 0);
  for (int64_t i = 0; i < p.W - 1 && p.initial_state != nullptr; ++i) {
    x[i] = load_element<Real>(p.initial_state, p.dtype, (n * p.D + d) * (p.W - 1) + i);
  }
  for (int64_t t = 0; t < span.length; ++t) {
    const int64_t index = span.b * p.x.stride_b + (span.first + t) * p.x.stride_t + d;
    x[p.W - 1 + t] = load_element<Real>(p.x.data, p.dtype, index);
  }
  return x;
}

template <typename Real>
struct Channel {
  std::vector<Real> weight;
  Real bias = 0;

  Channel(const ShortConvolutionProblem& p, int64_t d) : weight(p.W) {
    for (int64_t w = 0; w < p.W; ++w) {
      weight[w] = load_element<Real>(p.weight, p.weight_dtype, d * p.W + w);
    }
    if (p.bias != nullptr) bias = load_element<Real>(p.bias, p.weight_dtype, d);
  }

  /// The sum before the activation, at token t of the sequence with these inputs.
  Real operator()(const std::vector<Real>& x, int64_t t) const {
    Real z = bias;
    for (size_t w = 0; w < weight.size(); ++w) z += weight[w] * x[t + w];
    return z;
  }
};

}  // namespace

template <typename Real>
void short_convolution(const ShortConvolutionForward& p) {
  for (int64_t d = 0; d < p.D; ++d) {
    const Channel<Real> channel(p, d);
    for (int64_t n = 0; n < p.N; ++n) {
      const SequenceSpan span = sequence_span(p, n);
      const std::vector<Real> x = inputs<Real>(p, n, d);
      for (int64_t t = 0; t < span.length; ++t) {
        const Real z = channel(x, t);
        const int64_t index = span.b * p.y.stride_b + (span.first + t) * p.y.stride_t + d;
        store_element(p.y.data, p.dtype, index, p.silu ? silu(z) : z);
      }
      for (int64_t i = 0; i < p.W - 1 && p.final_state != nullptr; ++i) {
        store_element(p.final_state, p.dtype, (n * p.D + d) * (p.W - 1) + i, x[span.length + i]);
      }
    }
  }
}

template <typename Real>
void short_convolution_backward(const ShortConvolutionBackward& p) {
  const DType statistics = statistics_dtype(p.dtype);
  for (int64_t d = 0; d < p.D; ++d) {
    const Channel<Real> channel(p, d);
    std::vector<Real> d_weight(p.W, 0);
    Real d_bias = 0;
    for (int64_t n = 0; n < p.N; ++n) {
      const SequenceSpan span = sequence_span(p, n);
      const std::vector<Real> x = inputs<Real>(p, n, d);
      std::vector<Real> d_x(x.size(), 0);  // of the initial state, then of the tokens
      for (int64_t t = 0; t < span.length; ++t) {
        const int64_t index = span.b * p.d_y.stride_b + (span.first + t) * p.d_y.stride_t + d;
        Real d_z = load_element<Real>(p.d_y.data, p.dtype, index);
        if (p.silu) d_z *= silu_gradient(channel(x, t));
        for (int64_t w = 0; w < p.W; ++w) {
          d_x[t + w] += channel.weight[w] * d_z;
          d_weight[w] += x[t + w] * d_z;
        }
        d_bias += d_z;
      }
      for (int64_t i = 0; i < p.W - 1; ++i) {
        const int64_t index = (n * p.D + d) * (p.W - 1) + i;
        if (p.d_final_state != nullptr) {
          d_x[span.length + i] += load_element<Real>(p.d_final_state, p.dtype, index);
        }
      }
      for (int64_t i = 0; i < p.W - 1 && p.d_initial_state != nullptr; ++i) {
        store_element(p.d_initial_state, p.dtype, (n * p.D + d) * (p.W - 1) + i, d_x[i]);
      }
      for (int64_t t = 0; t < span.length; ++t) {
        const int64_t index = span.b * p.d_x.stride_b + (span.first + t) * p.d_x.stride_t + d;
        store_element(p.d_x.data, p.dtype, index, d_x[p.W - 1 + t]);
      }
    }
    for (int64_t w = 0; w < p.W && p.d_weight != nullptr; ++w) {
      store_element(p.d_weight, statistics, d * p.W + w, d_weight[w]);
    }
    if (p.d_bias != nullptr) store_element(p.d_bias, statistics, d, d_bias);
  }
}

template void short_convolution<float>(const ShortConvolutionForward&);
template void short_convolution<double>(const ShortConvolutionForward&);
template void short_convolution_backward<float>(const ShortConvolutionBackward&);
template void short_convolution_backward<double>(const ShortConvolutionBackward&);

}  // namespace gdn::kernels::reference
