#include <cmath>
#include <limits>

#include <gdn/kernels/reference/cross_entropy.h>
#include <gdn/kernels/reference/element.h>

namespace gdn::kernels::reference {

template <typename Real>
void cross_entropy(const CrossEntropyForward& p) {
  const DType statistics = statistics_dtype(p.dtype);
  for (int64_t m = 0; m < p.M; ++m) {
    const auto logit = [&](int64_t j) {
      return load_element<Real>(p.logits.data, p.dtype, m * p.logits.stride + j);
    };
    Real loss = 0;
    Real log_sum_exp = 0;
    if (p.target[m] != p.ignore_index) {
      Real max = -std::numeric_limits<Real>::infinity();
      for (int64_t j = 0; j < p.vocabulary; ++j) max = std::fmax(max, logit(j));
      Real sum = 0;
      for (int64_t j = 0; j < p.vocabulary; ++j) sum += std::exp(logit(j) - max);
      log_sum_exp = max + std::log(sum);
      loss = log_sum_exp - logit(p.target[m]);
    }
    store_element(p.loss, statistics, m, loss);
    store_element(p.log_sum_exp, statistics, m, log_sum_exp);
  }
}

template <typename Real>
void cross_entropy_backward(const CrossEntropyBackward& p) {
  const DType statistics = statistics_dtype(p.dtype);
  for (int64_t m = 0; m < p.M; ++m) {
    const Real d_loss = load_element<Real>(p.d_loss, statistics, m);
    const Real log_sum_exp = load_element<Real>(p.log_sum_exp, statistics, m);
    for (int64_t j = 0; j < p.vocabulary; ++j) {
      Real d_logit = 0;
      if (p.target[m] != p.ignore_index) {
        const Real logit = load_element<Real>(p.logits.data, p.dtype, m * p.logits.stride + j);
        d_logit = d_loss * (std::exp(logit - log_sum_exp) - (j == p.target[m] ? 1 : 0));
      }
      store_element(p.d_logits.data, p.dtype, m * p.d_logits.stride + j, d_logit);
    }
  }
}

template void cross_entropy<float>(const CrossEntropyForward&);
template void cross_entropy<double>(const CrossEntropyForward&);
template void cross_entropy_backward<float>(const CrossEntropyBackward&);
template void cross_entropy_backward<double>(const CrossEntropyBackward&);

}  // namespace gdn::kernels::reference
