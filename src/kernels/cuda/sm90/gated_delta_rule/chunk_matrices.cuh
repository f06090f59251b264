// The matrix role: for every chunk, from its keys, queries and gates alone,
//   A = strict_lower(diag(beta) K K^T * D)    P = scale * lower(Q K^T) * D
//   T = X diag(beta), X = (I + A)^-1
//
// One warpgroup; warp w holds rows 16 w to 16 w + 15 of the two products. It computes row-block w
// of X^T by blocks of 16. With X_ww found by substitution in fp32, block (w, i) is
//   X_iw^T = -(sum_{w <= k < i} X_kw^T A_ik^T) X_ii^T
// in which each sum's terms stay in the warp's registers: accumulators of one product are the
// left operand of the next. So warps meet once a chunk, when A and the X_ii are in shared memory.
#pragma once

#include <gdn/kernels/cuda/sm90/gated_delta_rule/layout.cuh>

namespace gdn::kernels::cuda::sm90 {

/// Index of a thread in its warpgroup, and which rows and columns of accumulators it holds:
/// element 4 n + e of an accumulator is row `row` (+ 8 when e >= 2), column 8 n + `column` + e % 2.
struct Fragment {
  int warp, lane, row, column;
  __device__ explicit Fragment(int thread)
      : warp(__shfl_sync(0xffffffffU, thread / 32, 0)),
        lane(thread % 32),
        row(lane / 4),
        column(2 * (lane % 4)) {}
};

/// product = left right^T, both [64 tokens, 128]; in flight on return.
template <typename Element>
__device__ __forceinline__ void issue_product(float (&product)[32], uint32_t left, uint32_t right) {
  const uint64_t left_tile = swizzled_tile(left);
  const uint64_t right_tile = swizzled_tile(right);
  pin(product);
  wgmma_fence();
#pragma unroll
  for (int s = 0; s < kHeadDim / 16; ++s) {
    const uint32_t offset = (s / 4) * kHalfTileBytes + (s % 4) * 32;
    wgmma<Element, 64>(product, advance(left_tile, offset), advance(right_tile, offset), s > 0);
  }
  wgmma_commit();
}

/// Address of the calling lane's row for a 16 x 16 block of a swizzled 64 x 64 tile whose four 8 x
/// 8 matrices go (rows 0-7, columns 0-7), (8-15, 0-7), (0-7, 8-15), (8-15, 8-15): an accumulator's
/// order.
__device__ __forceinline__ uint32_t block_row(uint32_t tile, int block_row, int block_column,
                                              int lane) {
  return tile + swizzled(16 * block_row + lane % 16, 2 * block_column + lane / 16);
}

/// Calls body(std::integral_constant<int, warp>): each warp has code of its own, without branches
/// on which blocks it holds. A branch costs these few warps more latency than the work does.
template <typename Body>
__device__ __forceinline__ void for_warp(int warp, Body body) {
  switch (warp) {
    case 0:
      return body(std::integral_constant<int, 0>());
    case 1:
      return body(std::integral_constant<int, 1>());
    case 2:
      return body(std::integral_constant<int, 2>());
    default:
      return body(std::integral_constant<int, 3>());
  }
}

/// exp2(b_i - b_j) for this thread's elements of row-block kWarp that are not above it. Left of the
/// diagonal block it is exp2(b_i - b_J) exp2(b_J - b_j), J the end of j's block: both exponents are
/// <= 0, so neither factor overflows, and only 2 exponentials a block and thread remain of 8.
template <int kWarp>
struct Decays {
  float rows[kWarp + 1][2];       // [block][row or row + 8]
  float2 columns[2 * kWarp + 2];  // [8 columns]
  float diagonal[8];              // as an accumulator's 8; arbitrary above the diagonal

  __device__ __forceinline__ Decays(const GateVectors& gates, const Fragment& at) {
    const int i = 16 * kWarp + at.row;
    const float b[2] = {gates.b[i], gates.b[i + 8]};
    float2 b_diagonal[2];
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      b_diagonal[n] = *reinterpret_cast<const float2*>(&gates.b[16 * kWarp + 8 * n + at.column]);
    }
#pragma unroll
    for (int n = 0; n < 2 * kWarp; ++n) {
      columns[n] = *reinterpret_cast<const float2*>(&gates.to_block_end[8 * n + at.column]);
    }
#pragma unroll
    for (int block = 0; block < kWarp; ++block) {
      const float end = gates.b[16 * block + 15];
      rows[block][0] = exp2_approx(b[0] - end);
      rows[block][1] = exp2_approx(b[1] - end);
    }
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const float2 b_j = b_diagonal[e / 4];
      diagonal[e] = exp2_approx(b[e / 2 % 2] - (e % 2 == 0 ? b_j.x : b_j.y));
    }
  }
};

/// Where A takes beta from: that of its row, or that of its column. With G = strict_lower(K K^T *
/// D)
///   T = (I + diag(beta) G)^-1 diag(beta)    solves for U
///   T = (I + G diag(beta))^-1               solves for U / beta
enum class Beta { kOfRow, kOfColumn };

/// Row-block kWarp of A from that of K K^T: -A left of its diagonal block in fp16, the block in
/// fp32.
template <Beta kBeta, int kWarp>
__device__ __forceinline__ void store_a(const float (&kk)[32], const GateVectors& gates, __half* a,
                                        float* diagonal, const Fragment& at) {
  const int i = 16 * kWarp + at.row;
  float beta[2] = {1, 1};
  if constexpr (kBeta == Beta::kOfRow) {
    beta[0] = gates.beta[i];
    beta[1] = gates.beta[i + 8];
  }
  Decays<kWarp> decays(gates, at);
  if constexpr (kBeta == Beta::kOfColumn) {
#pragma unroll
    for (int n = 0; n < 2 * kWarp + 2; ++n) {
      const float2 column = *reinterpret_cast<const float2*>(&gates.beta[8 * n + at.column]);
      if (n < 2 * kWarp) {
        decays.columns[n].x *= column.x;
        decays.columns[n].y *= column.y;
      } else {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          decays.diagonal[4 * (n - 2 * kWarp) + e] *= e % 2 == 0 ? column.x : column.y;
        }
      }
    }
  }
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    // Elements on and above the diagonal are never read.
    diagonal[(8 * (e / 4) + at.column + e % 2) * kDiagonalColumn + at.row + 8 * (e / 2 % 2)] =
        kk[8 * kWarp + e] * (decays.diagonal[e] * beta[e / 2 % 2]);
  }
#pragma unroll
  for (int block = 0; block < kWarp; ++block) {
    const float factor[2] = {-decays.rows[block][0] * beta[0], -decays.rows[block][1] * beta[1]};
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
      const int n = 2 * block + pair / 2;
      const int r = pair % 2;
      const int e = 4 * n + 2 * r;
      *reinterpret_cast<uint32_t*>(&a[(i + 8 * r) * kHalfRow + 8 * n + at.column]) = pack<__half>(
          kk[e] * (decays.columns[n].x * factor[r]), kk[e + 1] * (decays.columns[n].y * factor[r]));
    }
  }
}

/// Row-block kWarp of P from that of Q K^T.
template <typename Element, int kWarp>
__device__ __forceinline__ void store_p(const float (&qk)[32], const GateVectors& gates,
                                        float scale, uint32_t p_tile, const Fragment& at) {
  const Decays<kWarp> decays(gates, at);
#pragma unroll
  for (int block = 0; block < kWarp; ++block) {
    const float factor[2] = {decays.rows[block][0] * scale, decays.rows[block][1] * scale};
    uint32_t packed[4];
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
      const int n = 2 * block + pair / 2;
      const int r = pair % 2;
      const int e = 4 * n + 2 * r;
      packed[pair] = pack<Element>(qk[e] * (decays.columns[n].x * factor[r]),
                                   qk[e + 1] * (decays.columns[n].y * factor[r]));
    }
    store_matrices(block_row(p_tile, kWarp, block, at.lane), packed[0], packed[1], packed[2],
                   packed[3]);
  }
  uint32_t packed[4];
#pragma unroll
  for (int pair = 0; pair < 4; ++pair) {
    const int row = at.row + 8 * (pair % 2);
    const int column = at.column + 8 * (pair / 2);
    const int e = 2 * pair;
    // Above the diagonal the exponent is positive: select, never multiply by zero.
    packed[pair] = pack<Element>(
        row >= column ? qk[8 * kWarp + e] * (decays.diagonal[e] * scale) : 0.0F,
        row > column ? qk[8 * kWarp + e + 1] * (decays.diagonal[e + 1] * scale) : 0.0F);
  }
  store_matrices(block_row(p_tile, kWarp, kWarp, at.lane), packed[0], packed[1], packed[2],
                 packed[3]);
}

/// Inverts I + the 16 x 16 strictly lower triangular `diagonal` by forward substitution in fp32,
/// one column a lane (lanes 16 to 31 repeat 0 to 15), and stores it in fp16, row by row, at `out`.
__device__ __forceinline__ void invert_diagonal(const float* diagonal, __half* out, int lane) {
  const int column = lane % 16;
  float x[16];
#pragma unroll
  for (int i = 0; i < 16; ++i) x[i] = i == column ? 1.0F : 0.0F;
#pragma unroll
  for (int k = 0; k < 15; ++k) {
#pragma unroll
    for (int quad = (k + 1) / 4; quad < 4; ++quad) {
      const float4 l = *reinterpret_cast<const float4*>(&diagonal[k * kDiagonalColumn + 4 * quad]);
      const float rows[4] = {l.x, l.y, l.z, l.w};
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (4 * quad + e > k) x[4 * quad + e] -= rows[e] * x[k];
      }
    }
  }
  const int row = lane < 16 ? 0 : 8;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    out[(row + i) * kHalfRow + column] = __float2half_rn(lane < 16 ? x[i] : x[i + 8]);
  }
}

/// Row-block kWarp of X^T from `a` (-A's blocks, and the X_ii on the diagonal), its rows times
/// beta where T has that factor, to the tile of T^T.
template <typename Element, Beta kBeta, int kWarp>
__device__ __forceinline__ void multiply_out(const __half* a, const GateVectors& gates,
                                             uint32_t t_tile, const Fragment& at) {
  // Matrices of block (i, k) of `a` in the order rows 0-7, columns 0-7; 0-7, 8-15; 8-15, 0-7; 8-15,
  // 8-15.
  const uint32_t lane_address =
      shared_address(a) +
      static_cast<uint32_t>((at.lane % 8 + 8 * (at.lane / 16)) * kHalfRow + 8 * (at.lane / 8 % 2)) *
          2;
  const auto block = [&](int i, int k) {
    return lane_address + static_cast<uint32_t>(16 * i * kHalfRow + 16 * k) * 2;
  };
  const auto store = [&](int i, const uint32_t(&t)[4]) {
    store_matrices(block_row(t_tile, kWarp, i, at.lane), t[0], t[1], t[2], t[3]);
  };
  uint32_t y[4 - kWarp][4];  // y[d]: block (kWarp, kWarp + d) of X^T as a left operand
  // The transpose of X_ww: its matrices (0, 1) and (1, 0) change places too, which is this order.
  load_matrices_transposed(y[0], block(kWarp, kWarp));
  uint32_t right[4 - kWarp][4 - kWarp][4];  // blocks (kWarp + d, kWarp + e)
#pragma unroll
  for (int d = 1; d < 4 - kWarp; ++d) {
#pragma unroll
    for (int e = 0; e <= d; ++e) load_matrices(right[d][e], block(kWarp + d, kWarp + e));
  }
  float beta[2] = {1, 1};
  if constexpr (kBeta == Beta::kOfRow) {
    beta[0] = gates.beta[16 * kWarp + at.row];
    beta[1] = gates.beta[16 * kWarp + at.row + 8];
  }
  uint32_t t[4];
#pragma unroll
  for (int m = 0; m < 4; ++m) {
    const float2 x = unpack<__half>(y[0][m]);
    t[m] = pack<Element>(x.x * beta[m % 2], x.y * beta[m % 2]);
  }
  store(kWarp, t);
#pragma unroll
  for (int d = 1; d < 4 - kWarp; ++d) {
    float sum[2][4] = {};
#pragma unroll
    for (int e = 0; e < d; ++e) {
      mma_half(sum[0], y[e], right[d][e][0], right[d][e][1]);
      mma_half(sum[1], y[e], right[d][e][2], right[d][e][3]);
    }
    const uint32_t left[4] = {
        pack<__half>(sum[0][0], sum[0][1]), pack<__half>(sum[0][2], sum[0][3]),
        pack<__half>(sum[1][0], sum[1][1]), pack<__half>(sum[1][2], sum[1][3])};
    float x[2][4] = {};
    mma_half(x[0], left, right[d][d][0], right[d][d][1]);
    mma_half(x[1], left, right[d][d][2], right[d][d][3]);
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      const float low = x[m / 2][2 * (m % 2)];
      const float high = x[m / 2][2 * (m % 2) + 1];
      y[d][m] = pack<__half>(low, high);
      t[m] = pack<Element>(low * beta[m % 2], high * beta[m % 2]);
    }
    store(kWarp + d, t);
  }
}

/// Each product runs while the inverse is computed: Q K^T beside the diagonal blocks', the next
/// chunk's K K^T beside the rest, or beside all of it where P is not wanted.
template <typename Element, Beta kBeta = Beta::kOfRow, bool kWithP = true, typename Shared>
__device__ __forceinline__ void run_chunk_matrices(const ProblemArguments& p, const Work& work,
                                                   Shared& shared, int thread) {
  const Fragment at(thread);
  float product[32];
  // Issued also beyond the last chunk, on whatever the tile holds and unused; and waited for before
  // the loop's end: where paths meet with different products in flight the compiler adds waits.
  const auto issue_keys = [&](int c) {
    const auto key = slot(shared.key_full, c);
    if (c < work.chunks) mbarrier_wait(shared_address(&shared.key_full[key.stage]), key.parity);
    const uint32_t k = shared_address(shared.k[key.stage]);
    issue_product<Element>(product, k, k);
  };
  issue_keys(0);
  wgmma_wait<0>();
  for (int c = 0; c < work.chunks; ++c) {
    const auto key = slot(shared.key_full, c);
    const auto matrix = slot(shared.matrix_full, c);
    const auto gate = slot(shared.gate_full, c);
    const GateVectors& gates = shared.gates[gate.stage];
    __half* a = shared.a[c % 2];
    float* diagonal = shared.diagonal[at.warp];
    mbarrier_wait(shared_address(&shared.gate_full[gate.stage]), gate.parity);
    pin(product);
    for_warp(at.warp, [&](auto warp) { store_a<kBeta, warp>(product, gates, a, diagonal, at); });
    __syncwarp();
    if constexpr (kWithP) {
      issue_product<Element>(product, shared_address(shared.q[key.stage]),
                             shared_address(shared.k[key.stage]));
    } else {
      issue_keys(c + 1);
    }
    invert_diagonal(diagonal, a + 16 * at.warp * (kHalfRow + 1), at.lane);
    mbarrier_wait(shared_address(&shared.matrix_empty[matrix.stage]), matrix.parity ^ 1);
    if constexpr (kWithP) {
      wgmma_wait<0>();
      pin(product);
      for_warp(at.warp, [&](auto warp) {
        store_p<Element, warp>(product, gates, p.scale, shared.p_tile(matrix.stage), at);
      });
      __syncwarp();
      issue_keys(c + 1);
    }
    named_barrier_sync(kMatrixBarrier, 128);
    for_warp(at.warp, [&](auto warp) {
      multiply_out<Element, kBeta, warp>(a, gates, shared.t_tile(matrix.stage), at);
    });
    fence_async_proxy();
    __syncwarp();
    if (at.lane == 0) mbarrier_arrive(shared_address(&shared.matrix_full[matrix.stage]));
    wgmma_wait<0>();
  }
}

/// Keeps the barriers going without the work, for a measurement of the state role alone.
__device__ inline void run_idle_matrices(const Work& work, SharedMemory& shared, int thread) {
  for (int c = 0; c < work.chunks; ++c) {
    const auto matrix = slot(shared.matrix_full, c);
    mbarrier_wait(shared_address(&shared.matrix_empty[matrix.stage]), matrix.parity ^ 1);
    if (thread % 32 == 0) mbarrier_arrive(shared_address(&shared.matrix_full[matrix.stage]));
  }
}

}  // namespace gdn::kernels::cuda::sm90
