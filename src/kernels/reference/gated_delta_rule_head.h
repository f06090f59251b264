// Between the strided arrays of a problem and the matrices of one head of one sequence.
#pragma once

#include <cmath>
#include <vector>

#include <gdn/kernels/gated_delta_rule.h>
#include <gdn/kernels/reference/element.h>
#include <gdn/kernels/reference/matrix.h>

namespace gdn::kernels::reference {

/// Tokens [begin, begin + length) of batch row b.
struct Sequence {
  int64_t b, begin, length;
};

inline Sequence sequence(const GatedDeltaRuleProblem& p, int64_t n) {
  if (p.cu_seqlens == nullptr) return {n, 0, p.T};
  return {0, p.cu_seqlens[n], p.cu_seqlens[n + 1] - p.cu_seqlens[n]};
}

/// Element type of g, beta and the states.
inline DType gate_dtype(const GatedDeltaRuleProblem& p) {
  return p.dtype == DType::f64 ? DType::f64 : DType::f32;
}

/// The rows [length, width] of one head of a [B, T, heads, width] tensor.
template <typename Real, typename Void>
Matrix<Real> load_rows(const View4<Void>& view, DType dtype, const Sequence& s, int64_t head,
                       int64_t width) {
  Matrix<Real> rows(s.length, width);
  for (int64_t t = 0; t < s.length; ++t) {
    const int64_t row = s.b * view.stride_b + (s.begin + t) * view.stride_t + head * view.stride_h;
    for (int64_t i = 0; i < width; ++i) rows(t, i) = load_element<Real>(view.data, dtype, row + i);
  }
  return rows;
}

template <typename Real>
void store_rows(const MutableView4& view, DType dtype, const Sequence& s, int64_t head,
                const Matrix<Real>& rows) {
  for (int64_t t = 0; t < s.length; ++t) {
    const int64_t row = s.b * view.stride_b + (s.begin + t) * view.stride_t + head * view.stride_h;
    for (int64_t i = 0; i < rows.cols(); ++i) store_element(view.data, dtype, row + i, rows(t, i));
  }
}

/// One value head of a [B, T, HV] tensor.
template <typename Real>
std::vector<Real> load_tokens(const void* data, const GatedDeltaRuleProblem& p, const Sequence& s,
                              int64_t head) {
  std::vector<Real> values(s.length);
  for (int64_t t = 0; t < s.length; ++t) {
    values[t] = load_element<Real>(data, gate_dtype(p), (s.b * p.T + s.begin + t) * p.HV + head);
  }
  return values;
}

template <typename Real>
void store_tokens(void* data, const GatedDeltaRuleProblem& p, const Sequence& s, int64_t head,
                  const std::vector<Real>& values) {
  for (int64_t t = 0; t < s.length; ++t) {
    store_element(data, gate_dtype(p), (s.b * p.T + s.begin + t) * p.HV + head, values[t]);
  }
}

/// The state [K, V] of one head of [N, HV, K, V] or, V first, [N, HV, V, K]; zeros when absent.
template <typename Real>
Matrix<Real> load_state(const void* states, const GatedDeltaRuleProblem& p, int64_t n,
                        int64_t head) {
  Matrix<Real> state(p.K, p.V);
  if (states == nullptr) return state;
  const int64_t first = (n * p.HV + head) * p.K * p.V;
  for (int64_t i = 0; i < p.K; ++i) {
    for (int64_t j = 0; j < p.V; ++j) {
      const int64_t index = p.state_v_first ? j * p.K + i : i * p.V + j;
      state(i, j) = load_element<Real>(states, gate_dtype(p), first + index);
    }
  }
  return state;
}

template <typename Real>
void store_state(void* states, const GatedDeltaRuleProblem& p, int64_t n, int64_t head,
                 const Matrix<Real>& state) {
  const int64_t first = (n * p.HV + head) * p.K * p.V;
  for (int64_t i = 0; i < p.K; ++i) {
    for (int64_t j = 0; j < p.V; ++j) {
      const int64_t index = p.state_v_first ? j * p.K + i : i * p.V + j;
      store_element(states, gate_dtype(p), first + index, state(i, j));
    }
  }
}

/// 1 / |x_t| for every row: rsqrt(sum(x^2) + 1e-6).
template <typename Real>
std::vector<Real> inverse_norms(const Matrix<Real>& x) {
  std::vector<Real> norms(x.rows());
  for (int64_t t = 0; t < x.rows(); ++t) norms[t] = 1 / std::sqrt(dot(x, t, x, t) + Real(1e-6));
  return norms;
}

template <typename Real>
Matrix<Real> l2_normalised(const Matrix<Real>& x) {
  return scale_rows(inverse_norms(x), x);
}

/// The gradient of x, given that of y = x r with r = rsqrt(sum(x^2) + 1e-6): r (dy - y (y . dy)).
template <typename Real>
Matrix<Real> l2_norm_backward(const Matrix<Real>& x, const Matrix<Real>& d_y) {
  const Matrix<Real> y = l2_normalised(x);
  std::vector<Real> projection(x.rows());
  for (int64_t t = 0; t < x.rows(); ++t) projection[t] = dot(y, t, d_y, t);
  return scale_rows(inverse_norms(x), d_y - scale_rows(projection, y));
}

/// What one value head of one sequence computes with.
template <typename Real>
struct Head {
  Matrix<Real> q, k;           // [T, K], normalised if the problem says so
  Matrix<Real> v;              // [T, V]
  std::vector<Real> g, beta;   // [T]
  Matrix<Real> initial_state;  // [K, V]
  Real scale;
  int64_t chunk_size;
};

template <typename Real>
Head<Real> load_head(const GatedDeltaRuleProblem& p, int64_t n, int64_t head) {
  const Sequence s = sequence(p, n);
  const int64_t key_head = head / (p.HV / p.H);
  Head<Real> result{load_rows<Real>(p.q, p.dtype, s, key_head, p.K),
                    load_rows<Real>(p.k, p.dtype, s, key_head, p.K),
                    load_rows<Real>(p.v, p.dtype, s, head, p.V),
                    load_tokens<Real>(p.g, p, s, head),
                    load_tokens<Real>(p.beta, p, s, head),
                    load_state<Real>(p.initial_state, p, n, head),
                    static_cast<Real>(p.scale),
                    p.chunk_size};
  if (p.qk_l2norm) {
    result.q = l2_normalised(result.q);
    result.k = l2_normalised(result.k);
  }
  return result;
}

}  // namespace gdn::kernels::reference
