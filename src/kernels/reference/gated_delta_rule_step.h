// The two forms of the recurrence, one token and one chunk at a time, as forward and backward use
// them.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include <gdn/kernels/reference/gated_delta_rule_head.h>

namespace gdn::kernels::reference {

/// One token of the recurrence:
///
///   S_t = exp(g_t) S_{t-1} + k_t u_t^T      u_t = beta_t (v_t - exp(g_t) S_{t-1}^T k_t)
template <typename Real>
struct Token {
  Matrix<Real> q, k;     // [1, K]
  Real decay;            // exp(g_t)
  Matrix<Real> decayed;  // [K, V], exp(g_t) S_{t-1}
  Matrix<Real> error;    // [1, V], u_t / beta_t
  Matrix<Real> u;        // [1, V]
  Matrix<Real> state;    // [K, V], S_t
};

template <typename Real>
Token<Real> compute_token(const Head<Real>& head, int64_t t, const Matrix<Real>& previous_state) {
  Token<Real> token;
  token.q = head.q.slice(t, 1);
  token.k = head.k.slice(t, 1);
  token.decay = std::exp(head.g[t]);
  token.decayed = token.decay * previous_state;
  token.error = head.v.slice(t, 1) - token.k * token.decayed;
  token.u = head.beta[t] * token.error;
  token.state = token.decayed + token.k.transposed() * token.u;
  return token;
}

/// One chunk, with b_i the sum of g up to token i of the chunk and S the state at its start:
///
///   D_ij = exp(b_i - b_j) for i >= j        A = strict_lower( diag(beta) (K K^T) * D )
///   (I + A) U = diag(beta) (V - diag(exp b) K S)
///
/// Every exponent is a sum of g, never a difference of two b, which would lose small g after a
/// large one.
template <typename Real>
struct Chunk {
  Matrix<Real> q, k;             // [C, K]
  std::vector<Real> beta;        // [C]
  Matrix<Real> D;                // [C, C]
  std::vector<Real> from_start;  // [C], exp(b_i)
  std::vector<Real> to_end;      // [C], exp(b_C - b_i)
  Real whole;                    // exp(b_C)
  Matrix<Real> error;            // [C, V], diag(beta)^-1 U
  Matrix<Real> U;                // [C, V]
  Matrix<Real> P;                // [C, C], lower(Q K^T) * D
  Matrix<Real> state;            // [K, V], S
};

template <typename Real>
Chunk<Real> compute_chunk(const Head<Real>& head, int64_t begin, const Matrix<Real>& state) {
  const int64_t C = std::min(head.chunk_size, head.q.rows() - begin);
  Chunk<Real> chunk;
  chunk.q = head.q.slice(begin, C);
  chunk.k = head.k.slice(begin, C);
  chunk.beta.assign(head.beta.begin() + begin, head.beta.begin() + begin + C);
  chunk.state = state;
  chunk.D = Matrix<Real>(C, C);
  for (int64_t j = 0; j < C; ++j) {
    Real sum = 0;
    for (int64_t i = j; i < C; ++i) {
      if (i > j) sum += head.g[begin + i];
      chunk.D(i, j) = std::exp(sum);
    }
    chunk.to_end.push_back(chunk.D(C - 1, j));
  }
  for (int64_t i = 0; i < C; ++i) {
    chunk.from_start.push_back(std::exp(head.g[begin]) * chunk.D(i, 0));
  }
  chunk.whole = chunk.from_start[C - 1];
  chunk.P = hadamard(chunk.q * chunk.k.transposed(), chunk.D);

  const Matrix<Real> KK = hadamard(chunk.k * chunk.k.transposed(), chunk.D);
  chunk.error = head.v.slice(begin, C) - scale_rows(chunk.from_start, chunk.k * state);
  chunk.U = Matrix<Real>(C, chunk.error.cols());
  for (int64_t i = 0; i < C; ++i) {  // forward substitution, row by row
    for (int64_t c = 0; c < chunk.U.cols(); ++c) {
      for (int64_t j = 0; j < i; ++j) chunk.error(i, c) -= KK(i, j) * chunk.U(j, c);
      chunk.U(i, c) = chunk.beta[i] * chunk.error(i, c);
    }
  }
  return chunk;
}

/// S' = exp(b_C) S + K^T diag(exp(b_C - b)) U
template <typename Real>
Matrix<Real> end_state(const Chunk<Real>& chunk) {
  return chunk.whole * chunk.state + chunk.k.transposed() * scale_rows(chunk.to_end, chunk.U);
}

}  // namespace gdn::kernels::reference
