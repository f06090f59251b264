// Backward of the gated delta rule, token by token and by chunks; dX is the gradient of X.
//
// Token by token, from the last to the first, with dS the gradient of S_t, S~ = exp(g_t) S_{t-1}
// and e = v_t - S~^T k_t, so that u_t = beta_t e:
//
//   dS += scale q_t do_t^T      dq = scale S_t do_t      du = dS^T k_t      dbeta = du . e
//   dv = beta_t du              dk = dS u_t - S~ dv      dS~ = dS - k_t dv^T
//   dg = <dS~, S~>              dS <- exp(g_t) dS~
//
// By chunks, given dO and dS' of the state at the chunk's end (symbols of the forward):
//
//   dU = scale P^T dO + diag(exp(b_C - b)) K dS'      Z  = (I + A)^-T dU      dA = -strict_lower(Z
//   U^T) dV = diag(beta) Z                                 dbeta_i = Z_i . (U_i / beta_i) dS =
//   exp(b_C) dS' + scale Q^T diag(exp b) dO - K^T diag(beta exp b) Z R  = scale lower(dO U^T) * D
//   M  = diag(beta) dA * D dQ = scale diag(exp b) dO S^T + R K dK = R^T Q + diag(exp(b_C - b)) U
//   dS'^T - diag(beta exp b) Z S^T + (M + M^T) K
//
// The gate of token t scales whatever passes from before t to t or later, so dg_t adds up exactly
// those paths, with X = scale (dO U^T) * P + dA * A. Differences of sums over b would cancel, and
// under strong decay leave rounding errors alone:
//
//   dg_t = sum_{j < t <= i} X_ij                                              token j to token i
//        + sum_{t <= i} exp(b_i) (scale (Q S)_i . dO_i - beta_i (K S)_i . Z_i)   start to token i
//        + sum_{j < t} exp(b_C - b_j) (K dS')_j . U_j                            token j to end
//        + exp(b_C) <S, dS'>                                                     start to end
#include <vector>

#include <gdn/kernels/reference/gated_delta_rule.h>
#include <gdn/kernels/reference/gated_delta_rule_head.h>
#include <gdn/kernels/reference/gated_delta_rule_step.h>

namespace gdn::kernels::reference {
namespace {

/// Gradients of one value head of one sequence; those of q and k before the normalisation.
template <typename Real>
struct Gradients {
  Matrix<Real> q, k;          // [T, K]
  Matrix<Real> v;             // [T, V]
  std::vector<Real> g, beta;  // [T]
  Matrix<Real> state;         // [K, V], of the initial state

  Gradients(int64_t T, int64_t K, int64_t V, Matrix<Real> d_final_state)
      : q(T, K), k(T, K), v(T, V), g(T), beta(T), state(std::move(d_final_state)) {}
};

template <typename Real>
Gradients<Real> recurrent(const Head<Real>& head, const Matrix<Real>& d_o,
                          const Matrix<Real>& d_final_state) {
  const int64_t T = head.q.rows();
  std::vector<Token<Real>> tokens;
  for (int64_t t = 0; t < T; ++t) {
    tokens.push_back(compute_token(head, t, t == 0 ? head.initial_state : tokens.back().state));
  }
  Gradients<Real> d(T, head.q.cols(), head.v.cols(), d_final_state);
  for (int64_t t = T - 1; t >= 0; --t) {
    const Token<Real>& token = tokens[t];
    const Matrix<Real> d_o_t = head.scale * d_o.slice(t, 1);
    const Matrix<Real> d_state = d.state + token.q.transposed() * d_o_t;
    const Matrix<Real> d_u = token.k * d_state;
    const Matrix<Real> d_v = head.beta[t] * d_u;
    const Matrix<Real> d_decayed = d_state - token.k.transposed() * d_v;
    d.q.set_rows(t, d_o_t * token.state.transposed());
    d.k.set_rows(t, token.u * d_state.transposed() - d_v * token.decayed.transposed());
    d.v.set_rows(t, d_v);
    d.beta[t] = inner(d_u, token.error);
    d.g[t] = inner(d_decayed, token.decayed);
    d.state = token.decay * d_decayed;
  }
  return d;
}

/// diag(a) diag(b)
template <typename Real>
std::vector<Real> product(std::vector<Real> a, const std::vector<Real>& b) {
  for (size_t i = 0; i < a.size(); ++i) a[i] *= b[i];
  return a;
}

/// (I + A)^-T dU by backward substitution.
template <typename Real>
Matrix<Real> solve_transposed(const Matrix<Real>& A, Matrix<Real> d_U) {
  for (int64_t i = A.rows() - 1; i >= 0; --i) {
    for (int64_t j = i + 1; j < A.rows(); ++j) {
      for (int64_t c = 0; c < d_U.cols(); ++c) d_U(i, c) -= A(j, i) * d_U(j, c);
    }
  }
  return d_U;
}

template <typename Real>
Matrix<Real> strict_lower(Matrix<Real> a) {
  for (int64_t i = 0; i < a.rows(); ++i) {
    for (int64_t j = i; j < a.cols(); ++j) a(i, j) = 0;
  }
  return a;
}

/// The gradient of g from the paths that cross each token's gate (head comment).
template <typename Real>
std::vector<Real> gate_gradient(const Matrix<Real>& token_to_token,
                                const std::vector<Real>& start_to_token,
                                const std::vector<Real>& token_to_end, Real start_to_end) {
  const int64_t C = token_to_token.rows();
  std::vector<Real> d_g(C, start_to_end);
  for (int64_t t = 0; t < C; ++t) {
    for (int64_t i = t; i < C; ++i) {
      d_g[t] += start_to_token[i];
      for (int64_t j = 0; j < t; ++j) d_g[t] += token_to_token(i, j);
    }
    for (int64_t j = 0; j < t; ++j) d_g[t] += token_to_end[j];
  }
  return d_g;
}

template <typename Real>
Gradients<Real> chunked(const Head<Real>& head, const Matrix<Real>& d_o,
                        const Matrix<Real>& d_final_state) {
  const int64_t T = head.q.rows();
  std::vector<Chunk<Real>> chunks;
  for (int64_t begin = 0; begin < T; begin += head.chunk_size) {
    chunks.push_back(
        compute_chunk(head, begin, begin == 0 ? head.initial_state : end_state(chunks.back())));
  }
  Gradients<Real> d(T, head.q.cols(), head.v.cols(), d_final_state);
  for (int64_t n = static_cast<int64_t>(chunks.size()) - 1; n >= 0; --n) {
    const Chunk<Real>& c = chunks[n];
    const int64_t begin = n * head.chunk_size;
    const int64_t C = c.q.rows();
    const Matrix<Real>& S = c.state;
    const Matrix<Real> d_S_end = d.state;                       // [K, V]
    const Matrix<Real> d_O = head.scale * d_o.slice(begin, C);  // [C, V], times scale
    const Matrix<Real> K_T = c.k.transposed();                  // [K, C]
    const Matrix<Real> A =                                      // [C, C]
        strict_lower(scale_rows(c.beta, hadamard(c.k * K_T, c.D)));

    const Matrix<Real> K_d_S_end = scale_rows(c.to_end, c.k * d_S_end);  // [C, V]
    const Matrix<Real> Z = solve_transposed(A, c.P.transposed() * d_O + K_d_S_end);
    const Matrix<Real> d_A = Real(-1) * strict_lower(Z * c.U.transposed());
    const Matrix<Real> beta_Z = scale_rows(c.beta, Z);  // [C, V]
    const Matrix<Real> start_beta_Z = scale_rows(c.from_start, beta_Z);
    const Matrix<Real> start_d_O = scale_rows(c.from_start, d_O);
    const Matrix<Real> d_O_U = d_O * c.U.transposed();  // [C, C]
    const Matrix<Real> R = hadamard(d_O_U, c.D);
    const Matrix<Real> M = scale_rows(c.beta, hadamard(d_A, c.D));

    d.v.set_rows(begin, beta_Z);
    d.q.set_rows(begin, start_d_O * S.transposed() + R * c.k);
    d.k.set_rows(begin, R.transposed() * c.q + scale_rows(c.to_end, c.U * d_S_end.transposed()) -
                            start_beta_Z * S.transposed() + (M + M.transposed()) * c.k);
    d.state = c.whole * d_S_end + c.q.transposed() * start_d_O - K_T * start_beta_Z;

    const Matrix<Real> Q_S = c.q * S;
    const Matrix<Real> K_S = c.k * S;
    std::vector<Real> start_to_token(C), token_to_end(C);
    for (int64_t i = 0; i < C; ++i) {
      d.beta[begin + i] = dot(Z, i, c.error, i);
      start_to_token[i] = dot(Q_S, i, start_d_O, i) - dot(K_S, i, start_beta_Z, i);
      token_to_end[i] = dot(K_d_S_end, i, c.U, i);
    }
    const std::vector<Real> d_g =
        gate_gradient(hadamard(d_O_U, c.P) + hadamard(d_A, A), start_to_token, token_to_end,
                      c.whole * inner(S, d_S_end));
    std::copy(d_g.begin(), d_g.end(), d.g.begin() + begin);
  }
  return d;
}

/// Computes every key head of every sequence with `form`: its q and k gather the gradients of all
/// value heads of the group before they are rounded.
template <typename Real>
void backward(const GatedDeltaRuleBackward& p,
              Gradients<Real> (*form)(const Head<Real>&, const Matrix<Real>&,
                                      const Matrix<Real>&)) {
  const int64_t group = p.H == 0 ? 0 : p.HV / p.H;
  p.parallel_for(p.N * p.H, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / p.H;
      const int64_t key_head = i % p.H;
      const Sequence s = sequence(p, n);
      Matrix<Real> d_q(s.length, p.K);
      Matrix<Real> d_k(s.length, p.K);
      for (int64_t head = key_head * group; head < (key_head + 1) * group; ++head) {
        const Gradients<Real> d =
            form(load_head<Real>(p, n, head), load_rows<Real>(p.d_o, p.dtype, s, head, p.V),
                 load_state<Real>(p.d_final_state, p, n, head));
        d_q = d_q + d.q;
        d_k = d_k + d.k;
        store_rows(p.d_v, p.dtype, s, head, d.v);
        store_tokens(p.d_g, p, s, head, d.g);
        store_tokens(p.d_beta, p, s, head, d.beta);
        if (p.d_initial_state != nullptr) store_state(p.d_initial_state, p, n, head, d.state);
      }
      if (p.qk_l2norm) {
        d_q = l2_norm_backward(load_rows<Real>(p.q, p.dtype, s, key_head, p.K), d_q);
        d_k = l2_norm_backward(load_rows<Real>(p.k, p.dtype, s, key_head, p.K), d_k);
      }
      store_rows(p.d_q, p.dtype, s, key_head, d_q);
      store_rows(p.d_k, p.dtype, s, key_head, d_k);
    }
  });
}

}  // namespace

template <typename Real>
void recurrent_gated_delta_rule_backward(const GatedDeltaRuleBackward& p) {
  backward<Real>(p, recurrent<Real>);
}

template <typename Real>
void chunk_gated_delta_rule_backward(const GatedDeltaRuleBackward& p) {
  backward<Real>(p, chunked<Real>);
}

template void recurrent_gated_delta_rule_backward<float>(const GatedDeltaRuleBackward&);
template void recurrent_gated_delta_rule_backward<double>(const GatedDeltaRuleBackward&);
template void chunk_gated_delta_rule_backward<float>(const GatedDeltaRuleBackward&);
template void chunk_gated_delta_rule_backward<double>(const GatedDeltaRuleBackward&);

}  // namespace gdn::kernels::reference
