// Forward of the gated delta rule; the equations stand in gated_delta_rule_step.h.
#include <algorithm>
#include <vector>

#include <gdn/kernels/reference/gated_delta_rule.h>
#include <gdn/kernels/reference/gated_delta_rule_head.h>
#include <gdn/kernels/reference/gated_delta_rule_step.h>

namespace gdn::kernels::reference {
namespace {

template <typename Real>
struct Result {
  Matrix<Real> o;                            // [T, V]
  Matrix<Real> final_state;                  // [K, V]
  std::vector<Matrix<Real>> segment_states;  // [K, V] each
};

template <typename Real>
Result<Real> recurrent(const Head<Real>& head) {
  Result<Real> result{Matrix<Real>(head.v.rows(), head.v.cols()), head.initial_state, {}};
  Matrix<Real>& state = result.final_state;
  for (int64_t t = 0; t < head.v.rows(); ++t) {
    if (t % kSegmentTokens == 0) result.segment_states.push_back(state);
    state = compute_token(head, t, state).state;
    result.o.set_rows(t, head.scale * (head.q.slice(t, 1) * state));  // scale * S_t^T q_t
  }
  return result;
}

template <typename Real>
Result<Real> chunked(const Head<Real>& head) {
  Result<Real> result{Matrix<Real>(head.v.rows(), head.v.cols()), head.initial_state, {}};
  Matrix<Real>& state = result.final_state;
  for (int64_t begin = 0; begin < head.v.rows(); begin += head.chunk_size) {
    if (begin % kSegmentTokens == 0) result.segment_states.push_back(state);
    const Chunk<Real> chunk = compute_chunk(head, begin, state);
    // O = scale * ( diag(exp b) Q S + P U )
    result.o.set_rows(
        begin, head.scale * (scale_rows(chunk.from_start, chunk.q * state) + chunk.P * chunk.U));
    state = end_state(chunk);
  }
  return result;
}

/// Computes every value head of every sequence with `form`.
template <typename Real>
void forward(const GatedDeltaRuleForward& p, Result<Real> (*form)(const Head<Real>&)) {
  p.parallel_for(p.N * p.HV, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / p.HV;
      const int64_t head = i % p.HV;
      const Result<Real> result = form(load_head<Real>(p, n, head));
      if (p.o.data != nullptr) store_rows(p.o, p.dtype, sequence(p, n), head, result.o);
      if (p.final_state != nullptr) store_state(p.final_state, p, n, head, result.final_state);
      if (p.segment_states == nullptr) continue;
      int64_t segment = first_segment(p, n);
      for (const Matrix<Real>& state : result.segment_states) {
        float* out = p.segment_states + (segment++ * p.HV + head) * p.K * p.V;
        for (int64_t row = 0; row < p.K; ++row) {
          for (int64_t col = 0; col < p.V; ++col) *out++ = static_cast<float>(state(row, col));
        }
      }
    }
  });
}

}  // namespace

template <typename Real>
void recurrent_gated_delta_rule(const GatedDeltaRuleForward& p) {
  forward<Real>(p, recurrent<Real>);
}

template <typename Real>
void chunk_gated_delta_rule(const GatedDeltaRuleForward& p) {
  forward<Real>(p, chunked<Real>);
}

template void recurrent_gated_delta_rule<float>(const GatedDeltaRuleForward&);
template void recurrent_gated_delta_rule<double>(const GatedDeltaRuleForward&);
template void chunk_gated_delta_rule<float>(const GatedDeltaRuleForward&);
template void chunk_gated_delta_rule<double>(const GatedDeltaRuleForward&);

}  // namespace gdn::kernels::reference
