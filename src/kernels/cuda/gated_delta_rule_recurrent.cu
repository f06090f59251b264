// Recurrent forward of the gated delta rule: the kernel for decoding. Each block holds some columns
// of V of one state in registers: one read of the state, all tokens, one write.
//
//   r = exp(g) S^T k      u = beta (v - r)      o = scale (exp(g) S^T q + u (k . q))
//   S <- exp(g) S + k u^T
//
// Both products with the state come from one pass over its old value. A thread owns kOwn columns v
// and kRows rows k of the state, so that it accesses 16 bytes at once in either layout:
//
//   [K, V]: kLanes lanes along v, 4 each; a warp's other lanes and the warps along k
//   [V, K]: a warp's lanes along k, 4 each; kOwn rows v a warp
#include <gdn/kernels/cuda/device.cuh>
#include <gdn/kernels/cuda/gate.cuh>
#include <gdn/kernels/cuda/gated_delta_rule.h>
#include <gdn/kernels/cuda/gated_delta_rule_recurrent.h>
#include <gdn/kernels/cuda/overlap.cuh>

namespace gdn::kernels::cuda {
namespace {

constexpr float kL2NormEps = 1e-6F;

/// How a block's part of the state lies in its threads.
template <bool kVFirst_, int kThreads_, int kRows_, int kLanes_ = 8, int kOwn_ = 4,
          int kBlocks_ = 1>
struct Tile {
  static constexpr bool kVFirst = kVFirst_;
  static constexpr int kThreads = kThreads_;
  static constexpr int kWarps = kThreads / kWarp;
  static constexpr int kRows = kRows_;    // of K, a thread
  static constexpr int kLanes = kLanes_;  // of a warp along V, with [K, V]
  static constexpr int kOwn = kOwn_;      // of V, a thread
  static constexpr int kColumns = kVFirst ? kWarps * kOwn : kLanes * kOwn;  // of V, a block
  static constexpr int kBlocks = kBlocks_;                                  // a multiprocessor
  static_assert(kVFirst || kOwn == 4);

  int64_t v;  // first of a thread's kOwn columns
  int k;      // first row

  __device__ Tile() {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const int64_t first = int64_t{blockIdx.y} * kColumns;
    if constexpr (kVFirst) {
      v = first + warp * kOwn;
      k = lane * 4;
    } else {
      v = first + lane % kLanes * kOwn;
      k = warp * (kWarp / kLanes) + lane / kLanes;
    }
  }
  /// The i-th row.
  __device__ int row(int i) const {
    return kVFirst ? k + i / 4 * 128 + i % 4 : k + i * (kThreads / kLanes);
  }
};

/// Calls body(first element in memory, i, w, step in i, step in w) for each 16 bytes that a thread
/// owns: elements (i, w), (i + step in i, w + step in w), ... four of them.
template <typename Tile, typename Body>
__device__ __forceinline__ void for_quads(const Tile& own, int64_t K, int64_t V, const Body& body) {
  if constexpr (Tile::kVFirst) {
#pragma unroll
    for (int w = 0; w < Tile::kOwn; ++w) {
#pragma unroll
      for (int i = 0; i < Tile::kRows; i += 4) body((own.v + w) * K + own.row(i), i, w, 1, 0);
    }
  } else {
#pragma unroll
    for (int i = 0; i < Tile::kRows; ++i) body(own.row(i) * V + own.v, i, 0, 0, 1);
  }
}

template <bool kVectors, typename Tile>
__device__ __forceinline__ void load_state(const float* state, const Tile& own, int64_t K,
                                           int64_t V, float (&s)[Tile::kRows][Tile::kOwn]) {
#pragma unroll
  for (int i = 0; i < Tile::kRows; ++i) {
#pragma unroll
    for (int w = 0; w < Tile::kOwn; ++w) s[i][w] = 0.0F;
  }
  if (state == nullptr) return;
  for_quads(own, K, V, [&](int64_t at, int i, int w, int di, int dw) {
    if constexpr (kVectors) {
      if (own.row(i) >= K || own.v + w >= V) return;
      const float4 quad = *reinterpret_cast<const float4*>(state + at);
      s[i][w] = quad.x;
      s[i + di][w + dw] = quad.y;
      s[i + 2 * di][w + 2 * dw] = quad.z;
      s[i + 3 * di][w + 3 * dw] = quad.w;
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (own.row(i + j * di) < K && own.v + w + j * dw < V) {
          s[i + j * di][w + j * dw] = state[at + j];
        }
      }
    }
  });
}

template <bool kVectors, typename Tile>
__device__ __forceinline__ void store_state(const float (&s)[Tile::kRows][Tile::kOwn],
                                            const Tile& own, int64_t K, int64_t V, float* state) {
  for_quads(own, K, V, [&](int64_t at, int i, int w, int di, int dw) {
    if constexpr (kVectors) {
      if (own.row(i) >= K || own.v + w >= V) return;
      *reinterpret_cast<float4*>(state + at) = make_float4(
          s[i][w], s[i + di][w + dw], s[i + 2 * di][w + 2 * dw], s[i + 3 * di][w + 3 * dw]);
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (own.row(i + j * di) < K && own.v + w + j * dw < V) {
          state[at + j] = s[i + j * di][w + j * dw];
        }
      }
    }
  });
}

/// One token's q and k in fp32, normalised where asked for, and sums over threads.
template <typename Tile>
struct Shared {
  float q[kMaxKeySize], k[kMaxKeySize];
  float norms[2][Tile::kWarps];
  float key_query[Tile::kWarps];
  // With [K, V], the products with the state: of the warps, and of all rows.
  static constexpr int kProducts = Tile::kVFirst ? 0 : 2 * Tile::kColumns;
  alignas(16) float parts[Tile::kVFirst ? 1 : Tile::kWarps][Tile::kVFirst ? 4 : kProducts];
  alignas(16) float products[Tile::kVFirst ? 4 : kProducts];
};

template <typename T, typename Tile>
__device__ void load_keys(const GatedDeltaRuleForward& p, int64_t b, int64_t t, int64_t h,
                          Shared<Tile>& shared) {
  const T* q =
      static_cast<const T*>(p.q.data) + b * p.q.stride_b + t * p.q.stride_t + h * p.q.stride_h;
  const T* k =
      static_cast<const T*>(p.k.data) + b * p.k.stride_b + t * p.k.stride_t + h * p.k.stride_h;
  const int warp = threadIdx.x / kWarp;
  float qq = 0.0F, kk = 0.0F, kq = 0.0F;
  for (int i = threadIdx.x; i < p.K; i += Tile::kThreads) {
    const float x = to_float(q[i]), y = to_float(k[i]);
    shared.q[i] = x;
    shared.k[i] = y;
    qq = fmaf(x, x, qq);
    kk = fmaf(y, y, kk);
    kq = fmaf(x, y, kq);
  }
  qq = warp_sum(qq);
  kk = warp_sum(kk);
  kq = warp_sum(kq);
  if (threadIdx.x % kWarp == 0) {
    shared.norms[0][warp] = qq;
    shared.norms[1][warp] = kk;
    shared.key_query[warp] = kq;
  }
}

/// The decay and the write strength of a token.
struct Gates {
  float decay, beta;
};

template <typename T>
__device__ Gates load_gates(const RecurrentGatedDeltaRule& p, int64_t b, int64_t t, int64_t h) {
  if (p.A_log == nullptr) {
    const int64_t i = (b * p.T + t) * p.HV + h;
    return {expf(static_cast<const float*>(p.g)[i]), static_cast<const float*>(p.beta)[i]};
  }
  const auto at = [&](const ConstView3& x) {
    return to_float(static_cast<const T*>(x.data)[b * x.stride_b + t * x.stride_t + h]);
  };
  return {expf(log_decay(at(p.a) + p.dt_bias[h], -expf(p.A_log[h]))),
          p.beta_factor * sigmoid(at(p.beta_logits))};
}

template <typename T, typename Tile, bool kVectors>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    recurrent_kernel(RecurrentGatedDeltaRule p) {
  constexpr int kWarps = Tile::kWarps, kRows = Tile::kRows, kOwn = Tile::kOwn;
  __shared__ Shared<Tile> shared;
  const int64_t n = blockIdx.x / p.HV, h = blockIdx.x % p.HV;
  const int64_t b = p.cu_seqlens == nullptr ? n : 0;
  const int64_t begin = p.cu_seqlens == nullptr ? 0 : p.cu_seqlens[n];
  const int64_t end = p.cu_seqlens == nullptr ? p.T : p.cu_seqlens[n + 1];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const Tile own;
  const int64_t state = (n * p.HV + h) * p.K * p.V;

  float s[kRows][kOwn];
  const auto* initial = static_cast<const float*>(p.initial_state);
  load_state<kVectors>(initial == nullptr ? nullptr : initial + state, own, p.K, p.V, s);
  wait_for_previous();
  let_next_start();
  for (int64_t t = begin; t < end; ++t) {
    __syncthreads();  // the last token's keys and sums have been read
    load_keys<T>(p, b, t, h / (p.HV / p.H), shared);
    const auto [decay, beta] = load_gates<T>(p, b, t, h);
    float v[kOwn];
    const T* values =
        static_cast<const T*>(p.v.data) + b * p.v.stride_b + t * p.v.stride_t + h * p.v.stride_h;
#pragma unroll
    for (int w = 0; w < kOwn; ++w) v[w] = own.v + w < p.V ? to_float(values[own.v + w]) : 0.0F;
    __syncthreads();

    float q_factor = static_cast<float>(p.scale), k_factor = 1.0F, key_query = 0.0F;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) key_query += shared.key_query[i];
    if (p.qk_l2norm) {
      float qq = 0.0F, kk = 0.0F;
#pragma unroll
      for (int i = 0; i < kWarps; ++i) {
        qq += shared.norms[0][i];
        kk += shared.norms[1][i];
      }
      q_factor /= sqrtf(qq + kL2NormEps);
      k_factor /= sqrtf(kk + kL2NormEps);
    }
    key_query *= q_factor * k_factor;

    // Both products with the old state: this thread's rows, then all of them.
    float k[kRows], with_k[kOwn] = {}, with_q[kOwn] = {};
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int row = own.row(i);
      k[i] = row < p.K ? shared.k[row] : 0.0F;
      const float q = row < p.K ? shared.q[row] : 0.0F;
#pragma unroll
      for (int w = 0; w < kOwn; ++w) {
        with_k[w] = fmaf(s[i][w], k[i], with_k[w]);
        with_q[w] = fmaf(s[i][w], q, with_q[w]);
      }
    }
#pragma unroll
    for (int d = Tile::kVFirst ? 1 : Tile::kLanes; d < kWarp; d *= 2) {
#pragma unroll
      for (int w = 0; w < kOwn; ++w) {
        with_k[w] += __shfl_xor_sync(0xFFFFFFFFU, with_k[w], d);
        with_q[w] += __shfl_xor_sync(0xFFFFFFFFU, with_q[w], d);
      }
    }
    if constexpr (!Tile::kVFirst) {
      constexpr int kColumns = Tile::kColumns;
      const int column = lane % Tile::kLanes * kOwn;
      if (lane < Tile::kLanes) {
        store<kOwn>(&shared.parts[warp][column], with_k);
        store<kOwn>(&shared.parts[warp][kColumns + column], with_q);
      }
      __syncthreads();
      for (int i = threadIdx.x; i < 2 * kColumns; i += Tile::kThreads) {
        float sum = 0.0F;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) sum += shared.parts[w][i];
        shared.products[i] = sum;
      }
      __syncthreads();
      load<kOwn>(&shared.products[column], with_k);
      load<kOwn>(&shared.products[kColumns + column], with_q);
    }

    const bool writes = Tile::kVFirst ? lane == 0 : threadIdx.x < Tile::kLanes;
    T* o = static_cast<T*>(p.o.data) + b * p.o.stride_b + t * p.o.stride_t + h * p.o.stride_h;
#pragma unroll
    for (int w = 0; w < kOwn; ++w) {
      const float u = beta * (v[w] - decay * k_factor * with_k[w]);
      if (writes && p.o.data != nullptr && own.v + w < p.V) {
        o[own.v + w] = from_float<T>(fmaf(decay * q_factor, with_q[w], u * key_query));
      }
      const float u_k = u * k_factor;
#pragma unroll
      for (int i = 0; i < kRows; ++i) s[i][w] = fmaf(decay, s[i][w], k[i] * u_k);
    }
    if (p.token_states != nullptr) {
      store_state<kVectors>(s, own, p.K, p.V,
                            p.token_states + ((b * p.T + t) * p.HV + h) * p.K * p.V);
    }
  }
  if (p.final_state != nullptr) {
    store_state<kVectors>(s, own, p.K, p.V, static_cast<float*>(p.final_state) + state);
  }
}

/// Calls body with the kind of tile that suits the request. What counts is the state's bytes that
/// are on their way at once: with blocks enough for every multiprocessor, few registers a thread
/// beside the state, and with [K, V] whole rows of V.
template <bool kVFirst, typename Body>
void with_tile(const GatedDeltaRuleForward& p, const Body& body) {
  constexpr int kNarrow = 8;  // lanes along V: 32 columns
  if (p.K > 256) return body.template operator()<Tile<kVFirst, 256, 16>>();
  if (p.K > 128) return body.template operator()<Tile<kVFirst, 256, 8, kNarrow, 4, 3>>();
  if constexpr (!kVFirst) {
    const int64_t blocks = p.N * p.HV * divide_up(p.V, 128);
    if (p.K > 64 && p.V >= 128 &&
        blocks >= int64_t{2} * device_attribute(cudaDevAttrMultiProcessorCount)) {
      return body.template operator()<Tile<kVFirst, 256, 16, 32, 4, 2>>();
    }
    if (p.K <= 64) return body.template operator()<Tile<kVFirst, 256, 2, kNarrow, 4, 4>>();
  }
  body.template operator()<Tile<kVFirst, 256, 4, kNarrow, 4, 4>>();
}

template <typename T, typename Tile>
void launch_tile(const RecurrentGatedDeltaRule& p, bool vectors, Stream stream) {
  const dim3 grid(static_cast<unsigned>(p.N * p.HV),
                  static_cast<unsigned>(divide_up(p.V, Tile::kColumns)));
  launch(vectors ? recurrent_kernel<T, Tile, true> : recurrent_kernel<T, Tile, false>, grid,
         Tile::kThreads, 0, stream, p.overlap, p);
}

}  // namespace

void recurrent_gated_delta_rule(const RecurrentGatedDeltaRule& p, Stream stream) {
  if (p.K > kMaxKeySize) {
    throw std::invalid_argument("recurrent_gated_delta_rule: K must be at most 512, got " +
                                std::to_string(p.K));
  }
  if (p.N == 0 || p.HV == 0) return;
  const auto aligned = [](const void* state) {
    return reinterpret_cast<uintptr_t>(state) % 16 == 0;
  };
  const bool vectors = (p.state_v_first ? p.K : p.V) % 4 == 0 && aligned(p.initial_state) &&
                       aligned(p.final_state) && aligned(p.token_states);
  with_element_type(p.dtype, [&]<typename T>(T*) {
    const auto launch_any = [&]<typename Tile>() { launch_tile<T, Tile>(p, vectors, stream); };
    if (p.state_v_first) {
      with_tile<true>(p, launch_any);
    } else {
      with_tile<false>(p, launch_any);
    }
  });
  check_launch("recurrent_gated_delta_rule");
}

void recurrent_gated_delta_rule(const GatedDeltaRuleForward& p, Stream stream) {
  recurrent_gated_delta_rule(RecurrentGatedDeltaRule{p}, stream);
}

}  // namespace gdn::kernels::cuda
