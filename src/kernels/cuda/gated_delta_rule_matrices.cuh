// The first kernels of a wave: the factors of the L2 norm, and the 64 x 64 matrices of every chunk,
// which do not depend on the state.
#pragma once

#include <gdn/kernels/cuda/gated_delta_rule_wave.cuh>

namespace gdn::kernels::cuda {

/// A warp a token and pair: factors [pairs, tokens, 2] = rsqrt(sum(x^2) + eps) of q and k.
template <typename T>
__global__ void __launch_bounds__(kTileThreads) l2_factors_kernel(GatedDeltaRuleProblem p, Wave w) {
  const int64_t pair = blockIdx.y;
  const int64_t index = w.first_pair + pair;
  const Segment s(p, index / p.H, w.segment);
  const int t = blockIdx.x * (kTileThreads / kWarp) + threadIdx.x / kWarp;
  if (t >= s.tokens) return;
  const int64_t head = index % p.H;
  const auto row = [&](const ConstView4& view) {
    return static_cast<const T*>(view.data) + s.b * view.stride_b + (s.begin + t) * view.stride_t +
           head * view.stride_h;
  };
  const T* q = row(p.q);
  const T* k = row(p.k);
  float qq = 0.0F, kk = 0.0F;
  for (int64_t i = threadIdx.x % kWarp; i < p.K; i += kWarp) {
    const float x = to_float(q[i]), y = to_float(k[i]);
    qq = fmaf(x, x, qq);
    kk = fmaf(y, y, kk);
  }
  qq = warp_sum(qq);
  kk = warp_sum(kk);
  if (threadIdx.x % kWarp == 0) {
    float* factor = w.factors + (pair * w.plan.chunks * kChunk + t) * 2;
    factor[0] = 1.0F / sqrtf(qq + kL2NormEps);
    factor[1] = 1.0F / sqrtf(kk + kL2NormEps);
  }
}

inline constexpr int kMatrixStride = 68;  // of a 64 x 64 matrix in shared memory

struct MatricesMemory {
  float kk[kChunk * kMatrixStride], qk[kChunk * kMatrixStride];
  float stages[2 * kStageFloats];  // of K and Q; then the matrix that is inverted
  ChunkGates gates;
};
static_assert(kChunk * kMatrixStride <= 2 * kStageFloats);

/// m: a unit lower triangular matrix [64, kMatrixStride], of which only the part below the diagonal
/// is read; it becomes its inverse X, zeros above included. Diagonal blocks of 16 first, by
/// substitution; then X_ij = -X_ii sum_k m_ik X_kj, block row by block row.
__device__ inline void invert(float* m) {
  constexpr int kBlock = 16;
  const int tid = static_cast<int>(threadIdx.x);
  const int r = tid / kBlock, c = tid % kBlock;
  const auto at = [&](int i, int j) -> float& { return m[i * kMatrixStride + j]; };
  float x[kBlock];
  if (tid < kChunk) {  // column c of diagonal block r
#pragma unroll
    for (int i = 0; i < kBlock; ++i) {
      x[i] = i == c ? 1.0F : 0.0F;
#pragma unroll
      for (int j = 0; j < i; ++j) x[i] = fmaf(-at(r * kBlock + i, r * kBlock + j), x[j], x[i]);
    }
  }
  __syncthreads();
  if (tid < kChunk) {
#pragma unroll
    for (int i = 0; i < kBlock; ++i) at(r * kBlock + i, r * kBlock + c) = x[i];
  }
  for (int block = 1; block < kChunk / kBlock; ++block) {
    const int row = block * kBlock + r;
    float sums[kChunk / kBlock - 1];
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kChunk / kBlock - 1; ++j) {
      sums[j] = 0.0F;
      if (j >= block) continue;
      for (int k = j * kBlock; k < block * kBlock; ++k) {
        sums[j] = fmaf(at(row, k), at(k, j * kBlock + c), sums[j]);
      }
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kChunk / kBlock - 1; ++j) {
      if (j < block) at(row, j * kBlock + c) = sums[j];
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kChunk / kBlock - 1; ++j) {
      sums[j] = 0.0F;
      if (j >= block) continue;
#pragma unroll
      for (int k = 0; k < kBlock; ++k) {
        sums[j] =
            fmaf(-at(row, block * kBlock + k), at(block * kBlock + k, j * kBlock + c), sums[j]);
      }
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kChunk / kBlock - 1; ++j) {
      if (j < block) at(row, j * kBlock + c) = sums[j];
    }
  }
  __syncthreads();
}

/// Grid: chunks, then pairs. Writes the inverse and P of every value head of the pair, for the
/// backward the other inverse and G too.
template <typename T, bool kBackward>
__global__ void __launch_bounds__(kTileThreads)
    chunk_matrices_kernel(GatedDeltaRuleProblem p, Wave w) {
  extern __shared__ __align__(16) float dynamic_memory[];
  auto& shared = *reinterpret_cast<MatricesMemory*>(dynamic_memory);
  constexpr Products kProducts = products_of<T>();
  const int c = static_cast<int>(blockIdx.x);
  const int64_t pair = blockIdx.y;
  const int64_t index = w.first_pair + pair;
  const int64_t n = index / p.H, key_head = index % p.H, group = p.HV / p.H;
  const Segment s(p, n, w.segment);
  if (c >= s.chunks()) return;

  // K K^T and Q K^T.
  const Rows<T> k = chunk_rows<T>(p.k, s, c, key_head, p.K, w.k_vectors);
  const Rows<T> q = chunk_rows<T>(p.q, s, c, key_head, p.K, w.q_vectors);
  Accumulator<4> kk, qk;
  float x[RowTile::kCount], y[RowTile::kCount];
  const auto fetch = [&](int step) {
    k.read(RowTile::row(), step * 32 + RowTile::column(), x);
    q.read(RowTile::row(), step * 32 + RowTile::column(), y);
  };
  const int steps = static_cast<int>((p.K + 31) / 32);
  float* k_stage = shared.stages;
  float* q_stage = shared.stages + kStageFloats;
  fetch(0);
  for (int step = 0; step < steps; ++step) {
    __syncthreads();
    RowTile::put<kProducts>(k_stage, x, 1.0F);
    RowTile::put<kProducts>(q_stage, y, 1.0F);
    __syncthreads();
    if (step + 1 < steps) fetch(step + 1);
    const Operand<36> left = {k_stage}, query = {q_stage};
    const Operand<36, true> right = {k_stage};
    kk.template add_product<kProducts, 32>(left, right);
    qk.template add_product<kProducts, 32>(query, right);
  }
  kk.for_each([&](int i, int j, float value) { shared.kk[i * kMatrixStride + j] = value; });
  qk.for_each([&](int i, int j, float value) { shared.qk[i * kMatrixStride + j] = value; });

  // The matrices of each value head, four elements of a row at a time.
  constexpr int kQuads = kMatrixSize / 4;
  const auto for_quads = [](const auto& body) {
#pragma unroll
    for (int quad = 0; quad < kQuads / kTileThreads; ++quad) {
      const int at = quad * kTileThreads + static_cast<int>(threadIdx.x);
      body(at / (kChunk / 4), at % (kChunk / 4) * 4);
    }
  };
  const auto store = [](float* to, const float(&x)[4]) {
    *reinterpret_cast<float4*>(to) = make_float4(x[0], x[1], x[2], x[3]);
  };
  float* m = shared.stages;
  ChunkGates& gates = shared.gates;
  for (int64_t j = 0; j < group; ++j) {
    const int64_t value_head = key_head * group + j;
    const int64_t matrix = ((pair * group + j) * w.plan.chunks + c) * kMatrixSize;
    const auto store_inverse = [&](float* to) {
      for_quads([&](int row, int first) {
        *reinterpret_cast<float4*>(to + matrix + row * kChunk + first) =
            *reinterpret_cast<const float4*>(m + row * kMatrixStride + first);
      });
    };
    __syncthreads();
    gates.fill(p, w, s, c, pair, value_head);
    __syncthreads();
    for_quads([&](int row, int first) {
      float reader[4], key[4], scaled[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int column = first + i, at = row * kMatrixStride + column;
        const float decay =
            column <= row ? gates.decay(row, column) * gates.k_factor[column] : 0.0F;
        reader[i] = column <= row
                        ? static_cast<float>(p.scale) * shared.qk[at] * gates.q_factor[row] * decay
                        : 0.0F;
        key[i] = column < row ? shared.kk[at] * gates.k_factor[row] * decay : 0.0F;
        scaled[i] = key[i] * gates.beta[column];
      }
      store(w.readers + matrix + row * kChunk + first, reader);
      if (kBackward) store(w.keys + matrix + row * kChunk + first, key);
      store(m + row * kMatrixStride + first, scaled);
    });
    __syncthreads();
    invert(m);
    store_inverse(w.inverse);
    if (kBackward) {
      __syncthreads();
      for_quads([&](int row, int first) {  // each thread reads what it has written
        float4 key = *reinterpret_cast<const float4*>(w.keys + matrix + row * kChunk + first);
        const float beta = gates.beta[row];
        const float scaled[4] = {key.x * beta, key.y * beta, key.z * beta, key.w * beta};
        store(m + row * kMatrixStride + first, scaled);
      });
      __syncthreads();
      invert(m);
      store_inverse(w.transposed_inverse);
    }
  }
}

}  // namespace gdn::kernels::cuda
