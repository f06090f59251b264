// The scan over the chunks of a segment, a block a slot and 16 kTiles columns of V, whose part of
// the state stays in shared memory (symbols of the design; U = diag(beta) U^):
//
//   R = V - diag(exp b) K S         U^ = (I + G diag(beta))^-1 R
//   O = scale diag(exp b) Q S + P U              S <- exp(b_C) S + K^T diag(exp(b_C - b)) U
//
// The L2 norm multiplies rows of K and Q by factors, which join the factors of the gates here.
#pragma once

#include <gdn/kernels/cuda/gated_delta_rule_wave.cuh>

namespace gdn::kernels::cuda {

/// Grid: blocks of columns of V, then slots. kReplay: for the backward, from the segment's kept
/// state; writes the states at the chunks' starts and U^, and no output.
template <typename T, int kTiles, bool kReplay>
__global__ void __launch_bounds__(kTileThreads)
    scan_kernel(GatedDeltaRuleForward p, Wave w, const float* kept_states) {
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

  if constexpr (kReplay) {
    const StateLayout kept(p, segment_state_index(p, n, w.segment, head));
    shared.load_state(kept_states, kept, K, V, v);
  } else if (w.segment == 0) {
    shared.load_state(static_cast<const float*>(p.initial_state), {p, n, head}, K, V, v);
  } else {
    shared.load_state(w.carry, {p, slot}, K, V, v);
  }
  if (!kReplay && p.segment_states != nullptr && s.tokens > 0) {
    __syncthreads();
    const StateLayout kept(p, segment_state_index(p, n, w.segment, head));
    shared.store_state(p.segment_states, kept, K, V, v);
  }

  const Operand<kStride> state = {shared.state}, tokens = {shared.tokens};
  const int key_steps = static_cast<int>((K + 31) / 32);
  for (int c = 0; c < s.chunks(); ++c) {
    const int64_t chunk = slot * w.plan.chunks + c;
    const int count = s.chunk_tokens(c);
    const Rows<T> k = chunk_rows<T>(p.k, s, c, key_head, K, w.k_vectors);
    const Rows<float> inverse = {w.inverse + chunk * kMatrixSize, kChunk, kChunk, kChunk, true};
    __syncthreads();  // the last chunk's gates have been read, its state is complete
    gates.fill(p, w, s, c, pair, head);
    if (kReplay) shared.store_state(w.states, {p, chunk}, K, V, v);

    // R, and what of O comes from the state. V is read ahead of its use.
    Accumulator<kTiles> r, o, values;
    const T* from = static_cast<const T*>(p.v.data) + s.b * p.v.stride_b +
                    s.token(c) * p.v.stride_t + head * p.v.stride_h + v;
    values.for_pairs([&](int i, int j, float& left, float& right) {
      const int64_t there = i < count ? V - v - j : 0;
      const float2 pair = load_pair(from + i * p.v.stride_t + j, there, w.value_pairs);
      left = pair.x;
      right = pair.y;
    });
    add_rows_product<kProducts, true>(r, k, key_steps, shared.stage, state);
    if (!kReplay) {
      const Rows<T> q = chunk_rows<T>(p.q, s, c, key_head, K, w.q_vectors);
      add_rows_product<kProducts, true>(o, q, key_steps, shared.stage, state);
      o.for_each([&](int i, int, float& value) {
        value *= static_cast<float>(p.scale) * gates.from_start[i] * gates.q_factor[i];
      });
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int e = 0; e < 4; e += 2) {
        const int i = r.row(e);
        const float factor = gates.from_start[i] * gates.k_factor[i];
        put_pair(shared.tokens + i * kStride + r.column(tile, e),
                 operand<kProducts>(values.c[tile][e] - factor * r.c[tile][e]),
                 operand<kProducts>(values.c[tile][e + 1] - factor * r.c[tile][e + 1]));
      }
    }

    // U^, then U in R's place.
    Accumulator<kTiles> u;
    add_rows_product<kProducts, false>(u, inverse, 2, shared.stage, tokens);
    if (kReplay) {
      float* u_hat = w.u_hat + chunk * kChunk * V + v;
      u.for_pairs([&](int i, int j, float left, float right) {
        store_pair(u_hat + i * V + j, left, right, V - v - j, w.value_pairs);
      });
    }
    if (kReplay && c + 1 == s.chunks()) break;
    __syncthreads();  // R has been read
    u.for_pairs([&](int i, int j, float left, float right) {
      put_pair(shared.tokens + i * kStride + j, operand<kProducts>(gates.beta[i] * left),
               operand<kProducts>(gates.beta[i] * right));
    });

    if (!kReplay && p.o.data != nullptr) {
      const Rows<float> readers = {w.readers + chunk * kMatrixSize, kChunk, kChunk, kChunk, true};
      add_rows_product<kProducts, false>(o, readers, 2, shared.stage, tokens);
      T* out = static_cast<T*>(p.o.data) + s.b * p.o.stride_b + s.token(c) * p.o.stride_t +
               head * p.o.stride_h + v;
      o.for_pairs([&](int i, int j, float left, float right) {
        const int64_t there = i < count ? V - v - j : 0;
        store_pair(out + i * p.o.stride_t + j, left, right, there, w.value_pairs);
      });
    }

    // S, 64 rows at a time.
    for (int64_t row = 0; row < K; row += kChunk) {
      Accumulator<kTiles> sum;
      sum.for_pairs([&](int i, int j, float& left, float& right) {
        const float2 old = get_pair(shared.state + (row + i) * kStride + j);
        left = gates.whole * old.x;
        right = gates.whole * old.y;
      });
      add_transposed_product<kProducts>(
          sum, k, static_cast<int>(row),
          [&](int token) { return gates.to_end[token] * gates.k_factor[token]; }, shared.stage,
          tokens);
      sum.for_pairs([&](int i, int j, float left, float right) {
        put_pair(shared.state + (row + i) * kStride + j, left, right);
      });
    }
  }
  if (kReplay) return;
  __syncthreads();
  if (!s.last) {
    shared.store_state(w.carry, {p, slot}, K, V, v);
  } else if (p.final_state != nullptr) {
    shared.store_state(static_cast<float*>(p.final_state), {p, n, head}, K, V, v);
  }
}

}  // namespace gdn::kernels::cuda
