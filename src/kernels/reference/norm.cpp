#include <cmath>
#include <vector>

#include <gdn/kernels/reference/element.h>
#include <gdn/kernels/reference/norm.h>

namespace gdn::kernels::reference {
namespace {

template <typename Real>
struct Row {
  std::vector<Real> x, gate, weight;
  Real r;  // the row's factor

  Row(const NormProblem& p, const ConstView2& input, int64_t m)
      : x(p.D), gate(p.D), weight(p.D, 1) {
    Real sum = 0;
    for (int64_t i = 0; i < p.D; ++i) {
      x[i] = load_element<Real>(input.data, p.dtype, m * input.stride + i);
      sum += x[i] * x[i];
      if (p.weight != nullptr) weight[i] = load_element<Real>(p.weight, p.weight_dtype, i);
      if (p.gate.data != nullptr) {
        gate[i] = load_element<Real>(p.gate.data, p.dtype, m * p.gate.stride + i);
      }
    }
    r = 1 / std::sqrt(sum * per_row(p) + static_cast<Real>(p.eps));
  }

  static Real per_row(const NormProblem& p) {
    return p.kind == NormKind::rms ? Real(1) / static_cast<Real>(p.D) : Real(1);
  }
};

/// Writes x + residual.
template <typename Real>
void add_residual(const NormForward& p, int64_t m) {
  for (int64_t i = 0; i < p.D; ++i) {
    const Real x = load_element<Real>(p.x.data, p.dtype, m * p.x.stride + i);
    const Real residual = load_element<Real>(p.residual.data, p.dtype, m * p.residual.stride + i);
    store_element(p.sum.data, p.dtype, m * p.sum.stride + i, x + residual);
  }
}

}  // namespace

template <typename Real>
void norm(const NormForward& p) {
  const bool adds = p.residual.data != nullptr;
  for (int64_t m = 0; m < p.M; ++m) {
    if (adds) add_residual<Real>(p, m);
    const Row<Real> row(p, adds ? ConstView2{p.sum.data, p.sum.stride} : p.x, m);
    for (int64_t i = 0; i < p.D; ++i) {
      Real y = row.x[i] * row.r * row.weight[i];
      if (p.gate.data != nullptr) y *= silu(row.gate[i]);
      store_element(p.y.data, p.dtype, m * p.y.stride + i, y);
    }
  }
}

template <typename Real>
void norm_backward(const NormBackward& p) {
  std::vector<Real> d_weight(p.D, 0);
  for (int64_t m = 0; m < p.M; ++m) {
    const Row<Real> row(p, p.x, m);
    std::vector<Real> h(p.D);
    Real c = 0;
    for (int64_t i = 0; i < p.D; ++i) {
      const Real normed = row.x[i] * row.r;
      Real d_y = load_element<Real>(p.d_y.data, p.dtype, m * p.d_y.stride + i);
      if (p.gate.data != nullptr) {
        const Real d_gate = d_y * normed * row.weight[i] * silu_gradient(row.gate[i]);
        store_element(p.d_gate.data, p.dtype, m * p.d_gate.stride + i, d_gate);
        d_y *= silu(row.gate[i]);
      }
      d_weight[i] += d_y * normed;
      h[i] = d_y * row.weight[i];
      c += h[i] * normed;
    }
    c *= row.per_row(p);
    for (int64_t i = 0; i < p.D; ++i) {
      Real d_x = row.r * (h[i] - row.x[i] * row.r * c);
      if (p.d_sum.data != nullptr) {
        d_x += load_element<Real>(p.d_sum.data, p.dtype, m * p.d_sum.stride + i);
      }
      store_element(p.d_x.data, p.dtype, m * p.d_x.stride + i, d_x);
    }
  }
  if (p.d_weight == nullptr) return;
  for (int64_t i = 0; i < p.D; ++i) {
    store_element(p.d_weight, statistics_dtype(p.dtype), i, d_weight[i]);
  }
}

template void norm<float>(const NormForward&);
template void norm<double>(const NormForward&);
template void norm_backward<float>(const NormBackward&);
template void norm_backward<double>(const NormBackward&);

}  // namespace gdn::kernels::reference
