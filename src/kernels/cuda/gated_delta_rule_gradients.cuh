// The gradients of a chunk that need the states on both of its sides, a block a chunk and slot.
// With U^, Z and the gates as the scans left them, and U = diag(beta) U^, dV = diag(beta) Z:
//
//   dP = scale (dO U^T) o D, lower        dG = -(dV U^T) o D, strictly lower
//   dQ = scale diag(exp b) dO S^T + dP K
//   dK = -diag(exp b) dV S^T                                 (k as the reader of the state)
//      + diag(exp(b_C - b)) U dS'^T                          (k as its writer)
//      + (dG + dG^T) K + dP^T Q                              dbeta_i = Z_i . U^_i
//
// The gradient of g_t sums over everything that decays across token t; nothing cancels. With
// X = dP o (Q K^T) + dG o (K K^T), and dQ, dK here without their products within the chunk:
//
//   dg_t = exp(b_C) <dS', S> + sum_{i >= t} (q_i . dQ_i + k_i . (dK as reader)_i)
//        + sum_{j < t} k_j . (dK as writer)_j + sum_{j < t <= i} X_ij
#pragma once

#include <gdn/kernels/cuda/gated_delta_rule_matrices.cuh>

namespace gdn::kernels::cuda {

/// 64 rows, 16 columns of V.
using ValueTile = TileShape<64, 16, 20>;

struct GradientMemory {
  float d_p[kChunk * kMatrixStride], d_g[kChunk * kMatrixStride];
  float stages[5 * ValueTile::kFloats];  // d_o, z, u_hat, state, d_state
  float read[2][kChunk], written[2][kChunk], crossing[kChunk];
  ChunkGates gates;
};
inline constexpr int kRowSumBytes = kWarp * 4;  // of row_sum(), beside it
static_assert(sizeof(GradientMemory) + kRowSumBytes <= kLeastSharedBytes);
inline constexpr int kCrossingStride = kChunk + 1;
static_assert(kChunk * kCrossingStride <= 5 * ValueTile::kFloats);
static_assert(2 * kStageFloats <= 5 * ValueTile::kFloats);

/// crossing[t] = sum_{j < t <= i} x_ij for x strictly lower [64, kCrossingStride], overwritten.
__device__ inline void crossing_sums(float* x, float* crossing) {
  const int line = static_cast<int>(threadIdx.x) / 4, part = static_cast<int>(threadIdx.x) % 4;
  constexpr int kCount = kChunk / 4;
  // Row `line`: element t becomes the sum of those before it.
  float values[kCount], sum = 0.0F;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    values[i] = x[line * kCrossingStride + part * kCount + i];
    sum += values[i];
  }
  float before = 0.0F;
#pragma unroll
  for (int lower = 0; lower < 3; ++lower) {
    const float other = __shfl_sync(0xFFFFFFFFU, sum, lower, 4);
    if (lower < part) before += other;
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    x[line * kCrossingStride + part * kCount + i] = before;
    before += values[i];
  }
  __syncthreads();
  // Column t = `line`: the sum over the rows from t on.
  sum = 0.0F;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int row = part * kCount + i;
    if (row >= line) sum += x[row * kCrossingStride + line];
  }
  sum += __shfl_xor_sync(0xFFFFFFFFU, sum, 1);
  sum += __shfl_xor_sync(0xFFFFFFFFU, sum, 2);
  if (part == 0) crossing[line] = sum;
}

/// Grid: chunks, then slots. Writes d_beta, d_g, and the value head's parts of d_q and d_k, those
/// of the normalised q and k.
template <typename T>
__global__ void __launch_bounds__(kTileThreads)
    chunk_gradients_kernel(GatedDeltaRuleBackward p, Wave w) {
  extern __shared__ __align__(16) float dynamic_memory[];
  auto& shared = *reinterpret_cast<GradientMemory*>(dynamic_memory);
  constexpr Products kProducts = products_of<T>();
  const int c = static_cast<int>(blockIdx.x);
  const int64_t group = p.HV / p.H, slot = blockIdx.y, pair = slot / group;
  const int64_t index = w.first_pair + pair;
  const int64_t n = index / p.H, key_head = index % p.H, head = key_head * group + slot % group;
  const int64_t K = p.K, V = p.V;
  const Segment s(p, n, w.segment);
  if (c >= s.chunks()) return;
  const int count = s.chunk_tokens(c);
  const int64_t chunk = slot * w.plan.chunks + c;
  const bool vectors = V % 4 == 0;  // of scratch rows
  const Rows<T> d_o = chunk_rows<T>(p.d_o, s, c, head, V, w.d_o_vectors);
  const Rows<float> z = {w.z + chunk * kChunk * V, V, kChunk, static_cast<int>(V), vectors};
  const Rows<float> u_hat = {w.u_hat + chunk * kChunk * V, V, kChunk, static_cast<int>(V), vectors};
  const auto scale = static_cast<float>(p.scale);
  ChunkGates& gates = shared.gates;
  gates.fill(p, w, s, c, pair, head);

  float* const stages = shared.stages;
  const auto stage = [&](int i) { return stages + i * ValueTile::kFloats; };
  const int row = ValueTile::row(), column = ValueTile::column();
  const int value_steps = static_cast<int>((V + 15) / 16);
  float in[5][ValueTile::kCount];

  // dO U^^T and Z U^^T.
  Accumulator<4> d_o_u, z_u;
  const auto fetch_tokens = [&](int step) {
    d_o.read(row, step * 16 + column, in[0]);
    z.read(row, step * 16 + column, in[1]);
    u_hat.read(row, step * 16 + column, in[2]);
  };
  fetch_tokens(0);
  for (int step = 0; step < value_steps; ++step) {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 3; ++i) ValueTile::put<kProducts>(stage(i), in[i], 1.0F);
    __syncthreads();
    if (step + 1 < value_steps) fetch_tokens(step + 1);
    const Operand<20, true> right = {stage(2)};
    d_o_u.template add_product<kProducts, 16>(Operand<20>{stage(0)}, right);
    z_u.template add_product<kProducts, 16>(Operand<20>{stage(1)}, right);
  }
  __syncthreads();  // the stages have been read; X takes their place

  // dP, dG and X; d_beta is the diagonal of Z U^^T.
  const int64_t first_gate = (s.b * p.T + s.token(c)) * p.HV + head;
  const auto add_pair = [&](int i, int j, float value, bool reader) {
    const int64_t at = chunk * kMatrixSize + i * kChunk + j;
    float d = 0.0F, crossing = 0.0F;
    if (reader ? j <= i : j < i) {
      const float decayed = gates.beta[j] * value;
      const float factor = reader ? 1.0F : -gates.beta[i];
      d = factor * (reader ? scale : 1.0F) * decayed * gates.decay(i, j);
      crossing = factor * decayed * (reader ? w.readers : w.keys)[at];
    }
    (reader ? shared.d_p : shared.d_g)[i * kMatrixStride + j] = operand<kProducts>(d);
    return j < i ? crossing : 0.0F;
  };
  d_o_u.for_each([&](int i, int j, float value) {
    stages[i * kCrossingStride + j] = add_pair(i, j, value, true);
  });
  z_u.for_each([&](int i, int j, float value) {
    stages[i * kCrossingStride + j] += add_pair(i, j, value, false);  // this thread's own element
    if (i == j && i < count) static_cast<float*>(p.d_beta)[first_gate + i * p.HV] = value;
  });
  __syncthreads();
  crossing_sums(stages, shared.crossing);

  // dQ and dK, 64 columns of K at a time.
  float read[2] = {}, written[2] = {};  // of this thread's two rows
  float through = 0.0F;
  const Rows<T> k = chunk_rows<T>(p.k, s, c, key_head, K, w.k_vectors);
  const Rows<T> q = chunk_rows<T>(p.q, s, c, key_head, K, w.q_vectors);
  for (int first = 0; first < K; first += kChunk) {
    const auto state_rows = [&](const float* states) {
      return Rows<float>{states + chunk * K * V + first * V, V,
                         static_cast<int>(min(int64_t{kChunk}, K - first)), static_cast<int>(V),
                         vectors};
    };
    const Rows<float> state = state_rows(w.states), d_state = state_rows(w.d_states);
    const auto fetch = [&](int step) {
      fetch_tokens(step);
      state.read(row, step * 16 + column, in[3]);
      d_state.read(row, step * 16 + column, in[4]);
    };
    Accumulator<4> d_q, d_k, d_k_writer;  // d_k: as reader, then all
    fetch(0);
    for (int step = 0; step < value_steps; ++step) {
      __syncthreads();
#pragma unroll
      for (int i = 0; i < 5; ++i) ValueTile::put<kProducts>(stage(i), in[i], 1.0F);
#pragma unroll
      for (int i = 0; i < ValueTile::kCount; ++i) through = fmaf(in[3][i], in[4][i], through);
      __syncthreads();
      if (step + 1 < value_steps) fetch(step + 1);
      const Operand<20, true> s_right = {stage(3)}, d_s_right = {stage(4)};
      d_q.template add_product<kProducts, 16>(Operand<20>{stage(0)}, s_right);
      d_k.template add_product<kProducts, 16>(Operand<20>{stage(1)}, s_right);
      d_k_writer.template add_product<kProducts, 16>(Operand<20>{stage(2)}, d_s_right);
    }
#pragma unroll
    for (int tile = 0; tile < 4; ++tile) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int i = d_q.row(e), j = first + d_q.column(tile, e);
        float& q_part = d_q.c[tile][e];
        float& reader = d_k.c[tile][e];
        float& writer = d_k_writer.c[tile][e];
        q_part *= scale * gates.from_start[i];
        reader *= -gates.beta[i] * gates.from_start[i];
        writer *= gates.beta[i] * gates.to_end[i];
        float x[1], y[1];
        q.read(i, j, x);
        k.read(i, j, y);
        const float k_value = y[0] * gates.k_factor[i];
        read[e / 2] += x[0] * gates.q_factor[i] * q_part + k_value * reader;
        written[e / 2] += k_value * writer;
        reader += writer;
      }
    }

    // The products within the chunk, 32 tokens at a time.
    float* const k_stage = stages;
    float* const q_stage = stages + kStageFloats;
    for (int half = 0; half < kChunk; half += 32) {
      const int token = half + DepthTile::row();
      float x[DepthTile::kCount], y[DepthTile::kCount];
      q.read(token, first + DepthTile::column(), x);
      k.read(token, first + DepthTile::column(), y);
      __syncthreads();
      DepthTile::put<kProducts>(q_stage, x, gates.q_factor[token]);
      DepthTile::put<kProducts>(k_stage, y, gates.k_factor[token]);
      __syncthreads();
      const Operand<72> k_right = {k_stage}, q_right = {q_stage};
      // Columns (plain) or rows (transposed) from `half` on.
      const Operand<kMatrixStride> d_p = {shared.d_p + half}, d_g = {shared.d_g + half};
      const Operand<kMatrixStride, true> d_p_t = {shared.d_p + half * kMatrixStride},
                                         d_g_t = {shared.d_g + half * kMatrixStride};
      d_q.template add_product<kProducts, 32>(d_p, k_right);
      d_k.template add_product<kProducts, 32>(d_g, k_right);
      d_k.template add_product<kProducts, 32>(d_g_t, k_right);
      d_k.template add_product<kProducts, 32>(d_p_t, q_right);
    }
    const auto store = [&](Accumulator<4>& sum, float* to) {
      sum.for_each([&](int i, int j, float value) {
        if (i < count && first + j < K) to[(chunk * kChunk + i) * K + first + j] = value;
      });
    };
    store(d_q, w.d_q);
    store(d_k, w.d_k);
  }

  // d_g.
#pragma unroll
  for (int e = 0; e < 2; ++e) {
#pragma unroll
    for (int d = 1; d < 4; d *= 2) {
      read[e] += __shfl_xor_sync(0xFFFFFFFFU, read[e], d);
      written[e] += __shfl_xor_sync(0xFFFFFFFFU, written[e], d);
    }
    if (threadIdx.x % 4 == 0) {
      const int half = static_cast<int>(threadIdx.x) / 128, i = Accumulator<4>::first_row() + e * 8;
      shared.read[half][i] = read[e];
      shared.written[half][i] = written[e];
    }
  }
  through = gates.whole * row_sum<kTileThreads>(through);  // synchronises
  const int t = static_cast<int>(threadIdx.x);
  if (t >= count) return;
  float d_g = through + shared.crossing[t];
  for (int i = t; i < kChunk; ++i) d_g += shared.read[0][i] + shared.read[1][i];
  for (int i = 0; i < t; ++i) d_g += shared.written[0][i] + shared.written[1][i];
  static_cast<float*>(p.d_g)[first_gate + t * p.HV] = d_g;
}

/// A warp a token and pair: adds up d_q and d_k over the value heads, in their order, and takes
/// them through the L2 norm: for y = x r with r = (sum(x^2) + eps)^-1/2, dx = r (dy - y (y . dy)).
/// A lane has 4 elements in every 128.
template <typename T>
__global__ void __launch_bounds__(kTileThreads)
    key_gradients_kernel(GatedDeltaRuleBackward p, Wave w) {
  constexpr int kQuads = static_cast<int>(kMaxKeySize) / (4 * kWarp);
  const int64_t pair = blockIdx.y, index = w.first_pair + pair, group = p.HV / p.H;
  const Segment s(p, index / p.H, w.segment);
  const int t = blockIdx.x * (kTileThreads / kWarp) + threadIdx.x / kWarp;
  if (t >= s.tokens) return;
  const int first = threadIdx.x % kWarp * 4;
  const int64_t tokens = w.plan.chunks * kChunk;
  const auto add = [&](const float* parts, float(&d)[kQuads][4]) {
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
      float part[4];
      Rows<float>{parts, 0, 1, static_cast<int>(p.K), p.K % 4 == 0}.read(0, first + i * 4 * kWarp,
                                                                         part);
#pragma unroll
      for (int c = 0; c < 4; ++c) d[i][c] += part[c];
    }
  };
  float d_q[kQuads][4] = {}, d_k[kQuads][4] = {};
#pragma unroll 2
  for (int64_t h = 0; h < group; ++h) {
    const int64_t row = ((pair * group + h) * tokens + t) * p.K;
    add(w.d_q + row, d_q);
    add(w.d_k + row, d_k);
  }
  const auto write = [&](const ConstView4& input, const MutableView4& output, bool vectors,
                         const float(&d)[kQuads][4], int which) {
    const int64_t head = index % p.H;
    const Rows<T> x_row = {static_cast<const T*>(input.data) + s.b * input.stride_b +
                               (s.begin + t) * input.stride_t + head * input.stride_h,
                           0, 1, static_cast<int>(p.K), vectors};
    T* d_x = static_cast<T*>(output.data) + s.b * output.stride_b +
             (s.begin + t) * output.stride_t + head * output.stride_h;
    float factor = 1.0F, along = 0.0F, y[kQuads][4] = {};  // without the norm, y is not asked for
    if (w.factors != nullptr) {
      factor = w.factors[(pair * tokens + t) * 2 + which];
#pragma unroll
      for (int i = 0; i < kQuads; ++i) {
        x_row.read(0, first + i * 4 * kWarp, y[i]);
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          y[i][c] *= factor;
          along = fmaf(y[i][c], d[i][c], along);
        }
      }
      along = warp_sum(along);
    }
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
      const int j = first + i * 4 * kWarp;
      float x[4];
#pragma unroll
      for (int c = 0; c < 4; ++c) x[c] = factor * (d[i][c] - y[i][c] * along);
      if (vectors && j + 4 <= p.K) {
        store<4>(d_x + j, x);
      } else {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          if (j + c < p.K) d_x[j + c] = from_float<T>(x[c]);
        }
      }
    }
  };
  write(p.q, p.d_q, w.q_vectors, d_q, 0);
  write(p.k, p.d_k, w.k_vectors, d_k, 1);
}

}  // namespace gdn::kernels::cuda
