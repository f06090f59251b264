// The scan of the backward, from the last chunk of a segment to the first: the gradient of the
// state, a block a slot and 16 kTiles columns of V.
//
//   dU = P^T dO + diag(exp(b_C - b)) K dS'      Z = (I + diag(beta) G)^-T dU      dV = diag(beta) Z
//   dS = exp(b_C) dS' + scale Q^T diag(exp b) dO - K^T diag(beta exp b) Z
#pragma once

#include <gdn/kernels/cuda/gated_delta_rule_wave.cuh>

namespace gdn::kernels::cuda {

/// Grid: blocks of columns of V, then slots. Writes d_v, Z and the gradients of the states at the
/// chunks' ends; d_initial_state with the first segment.
template <typename T, int kTiles>
__global__ void __launch_bounds__(kTileThreads)
    reverse_scan_kernel(GatedDeltaRuleBackward p, Wave w) {
  extern __shared__ __align__(16) float dynamic_memory[];
  const ScanMemory<kTiles> shared(dynamic_memory, p.K);
  constexpr Products kProducts = products_of<T>();
  constexpr int kStride = ScanMemory<kTiles>::kStride;
  const int64_t group = p.HV / p.H, slot = blockIdx.y, pair = slot / group;
  const int64_t index = w.first_pair + pair;
  const int64_t n = index / p.H, key_head = index % p.H, head = key_head * group + slot % group;
  const int64_t v = int64_t{blockIdx.x} * ScanMemory<kTiles>::kColumns;
  const int64_t K = p.K, V = p.V;
  const Segment s(p, n, w.segment);
  if (s.absent(w.segment)) return;
  ChunkGates& gates = *shared.gates;

  if (s.last) {
    shared.load_state(static_cast<const float*>(p.d_final_state), {p, n, head}, K, V, v);
  } else {
    shared.load_state(w.carry, {p, slot}, K, V, v);
  }
  const Operand<kStride> d_state = {shared.state}, tokens = {shared.tokens};
  const int key_steps = static_cast<int>((K + 31) / 32);

  // d_state <- decay d_state + sum over tokens of factor(token) rows[token]^T tokens[token]
  const auto update = [&](float decay, const Rows<T>& rows, const auto& factor) {
    for (int64_t row = 0; row < K; row += kChunk) {
      Accumulator<kTiles> sum;
      sum.for_pairs([&](int i, int j, float& left, float& right) {
        const float2 old = get_pair(shared.state + (row + i) * kStride + j);
        left = decay * old.x;
        right = decay * old.y;
      });
      add_transposed_product<kProducts>(sum, rows, static_cast<int>(row), factor, shared.stage,
                                        tokens);
      sum.for_pairs([&](int i, int j, float left, float right) {
        put_pair(shared.state + (row + i) * kStride + j, left, right);
      });
    }
  };

  for (int c = s.chunks() - 1; c >= 0; --c) {
    const int64_t chunk = slot * w.plan.chunks + c;
    const int count = s.chunk_tokens(c);
    const Rows<T> k = chunk_rows<T>(p.k, s, c, key_head, K, w.k_vectors);
    const Rows<T> q = chunk_rows<T>(p.q, s, c, key_head, K, w.q_vectors);
    const auto matrix = [&](const float* matrices) {
      return Rows<float>{matrices + chunk * kMatrixSize, kChunk, kChunk, kChunk, true};
    };
    __syncthreads();  // the last chunk's gates and tokens have been read, its d_state is complete
    gates.fill(p, w, s, c, pair, head);
    shared.store_state(w.d_states, {p, chunk}, K, V, v);
    const T* d_o = static_cast<const T*>(p.d_o.data) + s.b * p.d_o.stride_b +
                   s.token(c) * p.d_o.stride_t + head * p.d_o.stride_h + v;
    Accumulator<kTiles> d_u, d_outputs;
    d_outputs.for_pairs([&](int i, int j, float& left, float& right) {
      const int64_t there = i < count ? V - v - j : 0;
      const float2 pair = load_pair(d_o + i * p.d_o.stride_t + j, there, w.value_pairs);
      left = pair.x;
      right = pair.y;
    });

    // dU; then dO has served, but for dS.
    add_rows_product<kProducts, true>(d_u, k, key_steps, shared.stage, d_state);
    d_u.for_each([&](int i, int, float& value) { value *= gates.to_end[i] * gates.k_factor[i]; });
    d_outputs.for_pairs([&](int i, int j, float left, float right) {
      put_pair(shared.tokens + i * kStride + j, left, right);  // 16-bit numbers are TF32 ones
    });
    const auto one = [](int) { return 1.0F; };
    add_transposed_product<kProducts>(d_u, matrix(w.readers), 0, one, shared.stage, tokens);
    update(gates.whole, q, [&](int token) {
      return static_cast<float>(p.scale) * gates.from_start[token] * gates.q_factor[token];
    });
    __syncthreads();  // dO has been read
    d_u.for_pairs([&](int i, int j, float left, float right) {
      put_pair(shared.tokens + i * kStride + j, operand<kProducts>(left),
               operand<kProducts>(right));
    });

    Accumulator<kTiles> z;
    add_transposed_product<kProducts>(z, matrix(w.transposed_inverse), 0, one, shared.stage,
                                      tokens);
    __syncthreads();  // dU has been read
    T* d_v = static_cast<T*>(p.d_v.data) + s.b * p.d_v.stride_b + s.token(c) * p.d_v.stride_t +
             head * p.d_v.stride_h + v;
    float* z_out = w.z + chunk * kChunk * V + v;
    z.for_pairs([&](int i, int j, float left, float right) {
      put_pair(shared.tokens + i * kStride + j, operand<kProducts>(left),
               operand<kProducts>(right));
      store_pair(z_out + i * V + j, left, right, V - v - j, w.value_pairs);
      store_pair(d_v + i * p.d_v.stride_t + j, gates.beta[i] * left, gates.beta[i] * right,
                 i < count ? V - v - j : 0, w.value_pairs);
    });
    update(1.0F, k, [&](int token) {
      return -gates.beta[token] * gates.from_start[token] * gates.k_factor[token];
    });
  }
  __syncthreads();
  if (w.segment > 0) {
    shared.store_state(w.carry, {p, slot}, K, V, v);
  } else if (p.d_initial_state != nullptr) {
    shared.store_state(static_cast<float*>(p.d_initial_state), {p, n, head}, K, V, v);
  }
}

}  // namespace gdn::kernels::cuda
