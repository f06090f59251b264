#include <cmath>
#include <vector>

#include <gdn/kernels/reference/element.h>
#include <gdn/kernels/reference/gate.h>

namespace gdn::kernels::reference {

template <typename Real>
void gate(const GateForward& p) {
  const DType statistics = statistics_dtype(p.dtype);
  for (int64_t i = 0; i < p.M * p.HV; ++i) {
    const int64_t h = i % p.HV;
    const Real rate = std::exp(load_element<Real>(p.A_log, statistics, h));
    const Real x =
        load_element<Real>(p.a, p.dtype, i) + load_element<Real>(p.dt_bias, statistics, h);
    store_element(p.g, statistics, i, -rate * softplus(x));
  }
}

template <typename Real>
void gate_backward(const GateBackward& p) {
  const DType statistics = statistics_dtype(p.dtype);
  std::vector<Real> d_A_log(p.HV, 0);
  std::vector<Real> d_dt_bias(p.HV, 0);
  for (int64_t i = 0; i < p.M * p.HV; ++i) {
    const int64_t h = i % p.HV;
    const Real rate = std::exp(load_element<Real>(p.A_log, statistics, h));
    const Real x =
        load_element<Real>(p.a, p.dtype, i) + load_element<Real>(p.dt_bias, statistics, h);
    const Real d_g = load_element<Real>(p.d_g, statistics, i);
    const Real d_a = -d_g * rate * sigmoid(x);
    store_element(p.d_a, p.dtype, i, d_a);
    d_dt_bias[h] += d_a;
    d_A_log[h] -= d_g * rate * softplus(x);
  }
  for (int64_t h = 0; h < p.HV; ++h) {
    store_element(p.d_A_log, statistics, h, d_A_log[h]);
    store_element(p.d_dt_bias, statistics, h, d_dt_bias[h]);
  }
}

template void gate<float>(const GateForward&);
template void gate<double>(const GateForward&);
template void gate_backward<float>(const GateBackward&);
template void gate_backward<double>(const GateBackward&);

}  // namespace gdn::kernels::reference
