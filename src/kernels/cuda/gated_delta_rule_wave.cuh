// How the portable chunked kernels share out their work, and the gates of a chunk.
//
// Kernels run in waves: one segment (kSegmentTokens tokens) of a group of sequences and key heads
// at a time, so that scratch memory is bounded however long the input is. The state, or its
// gradient, passes from wave to wave in `carry`. A pair is a sequence and a key head, a slot a
// sequence and a value head; both count within the group.
#pragma once

#include <gdn/kernels/cuda/gated_delta_rule.h>
#include <gdn/kernels/cuda/gated_delta_rule_plan.h>
#include <gdn/kernels/cuda/gated_delta_rule_tiles.cuh>

namespace gdn::kernels::cuda {

inline constexpr int kMatrixSize = kChunk * kChunk;
inline constexpr float kL2NormEps = 1e-6F;

/// What every kernel of a wave is given. Scratch arrays are fp32; `chunks` of plan.chunks, tokens
/// of plan.chunks * 64. Matrices of a chunk, with D_ij = exp(b_i - b_j) and scale in P:
///   G = strict_lower(K K^T) o D, P = scale lower(Q K^T) o D, all 64 x 64
struct Wave {
  WavePlan plan;
  int64_t first_pair = 0;
  int64_t segment = 0;
  bool q_vectors = false, k_vectors = false, d_o_vectors = false;
  bool value_pairs = false;             // V is even, and so are the places of all rows of it
  float* factors = nullptr;             // [pairs, tokens, 2] L2 norm of q and k; null: none
  float* inverse = nullptr;             // [slots, chunks] (I + G diag(beta))^-1
  float* readers = nullptr;             // [slots, chunks] P
  float* carry = nullptr;               // [slots, K, V]
  float* transposed_inverse = nullptr;  // [slots, chunks] (I + diag(beta) G)^-1; from here on only
  float* keys = nullptr;                // [slots, chunks] G                     for the backward
  float* states = nullptr;              // [slots, chunks, K, V] at the chunks' starts
  float* d_states = nullptr;            // [slots, chunks, K, V], of those at the chunks' ends
  float* u_hat = nullptr;               // [slots, tokens, V] U / beta
  float* z = nullptr;                   // [slots, tokens, V] d_v / beta
  float* d_q = nullptr;                 // [slots, tokens, K] a value head's part
  float* d_k = nullptr;                 // [slots, tokens, K]
};

/// One segment of one sequence.
struct Segment {
  int64_t n, b;
  int64_t length;  // of the sequence
  int64_t begin;   // first token of the segment, in the batch row
  int tokens;      // none or less: nothing to do, unless the sequence is empty
  bool last;

  __device__ Segment(const GatedDeltaRuleProblem& p, int64_t n, int64_t segment)
      : n(n), b(p.cu_seqlens == nullptr ? n : 0) {
    const int64_t first = p.cu_seqlens == nullptr ? 0 : p.cu_seqlens[n];
    length = p.cu_seqlens == nullptr ? p.T : p.cu_seqlens[n + 1] - first;
    begin = first + segment * kSegmentTokens;
    const int64_t rest = length - segment * kSegmentTokens;
    tokens = static_cast<int>(max(int64_t{0}, min(rest, kSegmentTokens)));
    last = rest <= kSegmentTokens;
  }
  /// Whether this wave has nothing for the sequence.
  __device__ bool absent(int64_t segment) const { return tokens == 0 && segment > 0; }
  __device__ int chunks() const { return (tokens + kChunk - 1) / kChunk; }
  __device__ int chunk_tokens(int c) const { return min(kChunk, tokens - c * kChunk); }
  /// The first token of chunk c.
  __device__ int64_t token(int c) const { return begin + c * kChunk; }
};

/// Index of the segment state that the forward kept for this segment and value head.
__device__ inline int64_t segment_state_index(const GatedDeltaRuleProblem& p, int64_t n,
                                              int64_t segment, int64_t value_head) {
  int64_t first = 0;
  if (p.cu_seqlens == nullptr) {
    first = n * ((p.T + kSegmentTokens - 1) / kSegmentTokens);
  } else {
    for (int64_t i = 0; i < n; ++i) {
      const int64_t length = p.cu_seqlens[i + 1] - p.cu_seqlens[i];
      first += (length + kSegmentTokens - 1) / kSegmentTokens;
    }
  }
  return (first + segment) * p.HV + value_head;
}

/// The rows of chunk c of one head of a [B, T, heads, columns] tensor.
template <typename T, typename Void>
__device__ Rows<T> chunk_rows(const View4<Void>& view, const Segment& s, int c, int64_t head,
                              int64_t columns, bool vectors) {
  return {static_cast<const T*>(view.data) + s.b * view.stride_b + s.token(c) * view.stride_t +
              head * view.stride_h,
          view.stride_t, s.chunk_tokens(c), static_cast<int>(columns), vectors};
}

/// exp(x) to fp32 accuracy: rounding a large |x| to fp32 first would cost |x| 2^-24 of the result.
__device__ inline float exp_to_float(double x) {
  const auto high = static_cast<float>(x);
  return expf(high) * (1.0F + static_cast<float>(x - high));
}

/// What depends on the gates of one chunk. b_i sums g up to and with token i; it is kept as two
/// floats, so that differences of large sums lose nothing. Tokens behind the end have g = beta = 0.
struct ChunkGates {
  float high[kChunk], low[kChunk];
  float beta[kChunk];
  float from_start[kChunk];                  // exp(b_i)
  float to_end[kChunk];                      // exp(b_C - b_i)
  float q_factor[kChunk], k_factor[kChunk];  // of the L2 norm
  float whole;                               // exp(b_C)

  /// exp(b_i - b_j), for j <= i.
  __device__ float decay(int i, int j) const {
    return expf((high[i] - high[j]) + (low[i] - low[j]));
  }

  /// Filled by the first warp; the caller synchronises.
  __device__ void fill(const GatedDeltaRuleProblem& p, const Wave& w, const Segment& s, int c,
                       int64_t pair, int64_t value_head) {
    if (threadIdx.x >= kWarp) return;
    // exp of anything below is 0 in fp32: nothing is lost, and -inf cannot make a NaN.
    constexpr float kLowestGate = -200.0F;
    const int count = s.chunk_tokens(c);
    const int64_t first = (s.b * p.T + s.token(c)) * p.HV + value_head;
    const int i = 2 * static_cast<int>(threadIdx.x);
    double g[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const bool real = i + j < count;
      const int64_t at = first + (i + j) * p.HV;
      const float gate = real ? static_cast<const float*>(p.g)[at] : 0.0F;
      g[j] = gate < kLowestGate ? kLowestGate : gate;
      beta[i + j] = real ? static_cast<const float*>(p.beta)[at] : 0.0F;
      q_factor[i + j] = k_factor[i + j] = 1.0F;
      if (w.factors != nullptr && real) {
        const float* factor = w.factors + (pair * w.plan.chunks * kChunk + c * kChunk + i + j) * 2;
        q_factor[i + j] = factor[0];
        k_factor[i + j] = factor[1];
      }
    }
    double sum = g[0] + g[1];  // becomes that of all lanes up to this one
#pragma unroll
    for (int d = 1; d < kWarp; d *= 2) {
      const double before = __shfl_up_sync(0xFFFFFFFFU, sum, d);
      if (threadIdx.x >= d) sum += before;
    }
    const double total = __shfl_sync(0xFFFFFFFFU, sum, kWarp - 1);
    const double b[2] = {sum - g[1], sum};
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      high[i + j] = static_cast<float>(b[j]);
      low[i + j] = static_cast<float>(b[j] - high[i + j]);
      from_start[i + j] = exp_to_float(b[j]);
      to_end[i + j] = exp_to_float(total - b[j]);
    }
    if (threadIdx.x == 0) whole = exp_to_float(total);
  }
};

/// Where element (k, v) of the state of a sequence and value head lies in an array of states.
struct StateLayout {
  int64_t first, stride_k, stride_v;

  __device__ StateLayout(const GatedDeltaRuleProblem& p, int64_t n, int64_t value_head)
      : first((n * p.HV + value_head) * p.K * p.V),
        stride_k(p.state_v_first ? 1 : p.V),
        stride_v(p.state_v_first ? p.K : 1) {}
  /// A slot of `carry`, or a state of scratch memory.
  __device__ StateLayout(const GatedDeltaRuleProblem& p, int64_t index)
      : first(index * p.K * p.V), stride_k(p.V), stride_v(1) {}
  __device__ int64_t operator()(int64_t k, int64_t v) const {
    return first + k * stride_k + v * stride_v;
  }
};

/// The scans' shared memory: columns v of a state, 64 rows of tokens of as many columns, a stage.
template <int kTiles>
struct ScanMemory {
  static constexpr int kColumns = kTiles * 16;
  static constexpr int kStride = scan_stride(kTiles);
  static_assert(scan_bytes(kChunk, kTiles) ==
                (2 * kChunk * kStride + kStageFloats) * 4 + sizeof(ChunkGates));

  float* state;   // [K rounded up to 64, kStride]
  float* tokens;  // [64, kStride]
  float* stage;
  ChunkGates* gates;

  __device__ ScanMemory(float* memory, int64_t K) {
    state = memory;
    tokens = state + (K + kChunk - 1) / kChunk * kChunk * kStride;
    stage = tokens + kChunk * kStride;
    gates = reinterpret_cast<ChunkGates*>(stage + kStageFloats);
  }

  /// Fills the state; rows and columns that do not exist become 0, as do all without a source.
  __device__ void load_state(const float* from, const StateLayout& at, int64_t K, int64_t V,
                             int64_t v) const {
    const int rows = static_cast<int>((K + kChunk - 1) / kChunk * kChunk);
    for (int i = threadIdx.x; i < rows * kColumns; i += kTileThreads) {
      const int k = i / kColumns, column = i % kColumns;
      const bool real = from != nullptr && k < K && v + column < V;
      state[k * kStride + column] = real ? from[at(k, v + column)] : 0.0F;
    }
  }
  __device__ void store_state(float* to, const StateLayout& at, int64_t K, int64_t V,
                              int64_t v) const {
    for (int i = threadIdx.x; i < K * kColumns; i += kTileThreads) {
      const int k = i / kColumns, column = i % kColumns;
      if (v + column < V) to[at(k, v + column)] = state[k * kStride + column];
    }
  }
};

}  // namespace gdn::kernels::cuda
