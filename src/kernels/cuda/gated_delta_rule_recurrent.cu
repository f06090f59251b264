// Recurrent forward of the gated delta rule: the kernel for decoding. Each block holds 32 columns
// of V of one state in registers: one read of the state, all tokens, one write.
//
//   r = exp(g) S^T k      u = beta (v - r)      o = scale (exp(g) S^T q + u (k . q))
//   S <- exp(g) S + k u^T
//
// Both products with the state come from one pass over its old value. A thread owns 4 columns v and
// kRows rows k of the state, so that it accesses 16 bytes at once in either layout:
//
//   [K, V]: 8 lanes along v, 4 each; the warp's 4 rows of lanes and the 8 warps along k
//   [V, K]: a warp's lanes along k, 4 each; 4 rows v a warp
#include <gdn/kernels/cuda/device.cuh>
#include <gdn/kernels/cuda/gated_delta_rule.h>

namespace gdn::kernels::cuda {
namespace {

constexpr int kBlock = 256;
constexpr int kWarps = kBlock / kWarp;
constexpr int kColumns = 32;  // of V, a block
constexpr int kOwn = 4;       // of V, a thread
constexpr float kL2NormEps = 1e-6F;

/// Which elements of the state a thread owns.
template <bool kVFirst>
struct Ownership {
  int64_t v;  // first of kOwn columns
  int k;      // first row

  __device__ Ownership() {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const int64_t tile = int64_t{blockIdx.y} * kColumns;
    if constexpr (kVFirst) {
      v = tile + warp * kOwn;
      k = lane * 4;
    } else {
      v = tile + lane % 8 * kOwn;
      k = warp * 4 + lane / 8;
    }
  }
  /// The i-th row.
  __device__ int row(int i) const { return kVFirst ? k + i / 4 * 128 + i % 4 : k + i * 32; }
};

/// Calls body(first element in memory, i, w, step in i, step in w) for each 16 bytes that a thread
/// owns: elements (i, w), (i + step in i, w + step in w), ... four of them.
template <bool kVFirst, int kRows, typename Body>
__device__ __forceinline__ void for_quads(const Ownership<kVFirst>& own, int64_t K, int64_t V,
                                          const Body& body) {
  if constexpr (kVFirst) {
#pragma unroll
    for (int w = 0; w < kOwn; ++w) {
#pragma unroll
      for (int i = 0; i < kRows; i += 4) body((own.v + w) * K + own.row(i), i, w, 1, 0);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kRows; ++i) body(own.row(i) * V + own.v, i, 0, 0, 1);
  }
}

template <bool kVFirst, int kRows, bool kVectors>
__device__ __forceinline__ void load_state(const float* state, const Ownership<kVFirst>& own,
                                           int64_t K, int64_t V, float (&s)[kRows][kOwn]) {
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
#pragma unroll
    for (int w = 0; w < kOwn; ++w) s[i][w] = 0.0F;
  }
  if (state == nullptr) return;
  for_quads<kVFirst, kRows>(own, K, V, [&](int64_t at, int i, int w, int di, int dw) {
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

template <bool kVFirst, int kRows, bool kVectors>
__device__ __forceinline__ void store_state(const float (&s)[kRows][kOwn],
                                            const Ownership<kVFirst>& own, int64_t K, int64_t V,
                                            float* state) {
  for_quads<kVFirst, kRows>(own, K, V, [&](int64_t at, int i, int w, int di, int dw) {
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
struct Shared {
  float q[kMaxKeySize], k[kMaxKeySize];
  float norms[2][kWarps];
  float key_query[kWarps];
  float sums[kWarps][kWarp / 4][2 * kOwn];  // of the warps, by the 8 lanes along v
};

template <typename T>
__device__ void load_keys(const GatedDeltaRuleForward& p, int64_t b, int64_t t, int64_t h,
                          Shared& shared) {
  const T* q =
      static_cast<const T*>(p.q.data) + b * p.q.stride_b + t * p.q.stride_t + h * p.q.stride_h;
  const T* k =
      static_cast<const T*>(p.k.data) + b * p.k.stride_b + t * p.k.stride_t + h * p.k.stride_h;
  const int warp = threadIdx.x / kWarp;
  float qq = 0.0F, kk = 0.0F, kq = 0.0F;
  for (int i = threadIdx.x; i < p.K; i += kBlock) {
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

template <typename T, bool kVFirst, int kRows, bool kVectors>
__global__ void __launch_bounds__(kBlock) recurrent_kernel(GatedDeltaRuleForward p) {
  __shared__ Shared shared;
  const int64_t n = blockIdx.x / p.HV, h = blockIdx.x % p.HV;
  const int64_t b = p.cu_seqlens == nullptr ? n : 0;
  const int64_t begin = p.cu_seqlens == nullptr ? 0 : p.cu_seqlens[n];
  const int64_t end = p.cu_seqlens == nullptr ? p.T : p.cu_seqlens[n + 1];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const Ownership<kVFirst> own;
  const int64_t state = (n * p.HV + h) * p.K * p.V;

  float s[kRows][kOwn];
  const auto* initial = static_cast<const float*>(p.initial_state);
  load_state<kVFirst, kRows, kVectors>(initial == nullptr ? nullptr : initial + state, own, p.K,
                                       p.V, s);
  for (int64_t t = begin; t < end; ++t) {
    __syncthreads();  // the last token's keys and sums have been read
    load_keys<T>(p, b, t, h / (p.HV / p.H), shared);
    const int64_t gate = (b * p.T + t) * p.HV + h;
    const float decay = expf(static_cast<const float*>(p.g)[gate]);
    const float beta = static_cast<const float*>(p.beta)[gate];
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
    float k[kRows], sums[2 * kOwn] = {};
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int row = own.row(i);
      k[i] = row < p.K ? shared.k[row] : 0.0F;
      const float q = row < p.K ? shared.q[row] : 0.0F;
#pragma unroll
      for (int w = 0; w < kOwn; ++w) {
        sums[w] = fmaf(s[i][w], k[i], sums[w]);
        sums[kOwn + w] = fmaf(s[i][w], q, sums[kOwn + w]);
      }
    }
#pragma unroll
    for (int d = kVFirst ? 1 : 8; d < kWarp; d *= 2) {
#pragma unroll
      for (int w = 0; w < 2 * kOwn; ++w) sums[w] += __shfl_xor_sync(0xFFFFFFFFU, sums[w], d);
    }
    if constexpr (!kVFirst) {
      if (lane < 8) {
#pragma unroll
        for (int w = 0; w < 2 * kOwn; ++w) shared.sums[warp][lane][w] = sums[w];
      }
      __syncthreads();
#pragma unroll
      for (int w = 0; w < 2 * kOwn; ++w) {
        sums[w] = 0.0F;
#pragma unroll
        for (int i = 0; i < kWarps; ++i) sums[w] += shared.sums[i][lane % 8][w];
      }
    }

    const bool writes = kVFirst ? lane == 0 : threadIdx.x < 8;
    T* o = static_cast<T*>(p.o.data) + b * p.o.stride_b + t * p.o.stride_t + h * p.o.stride_h;
#pragma unroll
    for (int w = 0; w < kOwn; ++w) {
      const float u = beta * (v[w] - decay * k_factor * sums[w]);
      if (writes && p.o.data != nullptr && own.v + w < p.V) {
        o[own.v + w] = from_float<T>(fmaf(decay * q_factor, sums[kOwn + w], u * key_query));
      }
      const float u_k = u * k_factor;
#pragma unroll
      for (int i = 0; i < kRows; ++i) s[i][w] = fmaf(decay, s[i][w], k[i] * u_k);
    }
  }
  if (p.final_state != nullptr) {
    store_state<kVFirst, kRows, kVectors>(s, own, p.K, p.V,
                                          static_cast<float*>(p.final_state) + state);
  }
}

/// Calls body with the number of rows a thread that covers K as a constant.
template <bool kVFirst, typename Body>
void with_rows(int64_t K, const Body& body) {
  const int64_t rows = kVFirst ? divide_up(K, 128) * 4 : divide_up(K, 32);
  if (rows <= 2 && !kVFirst) {
    body.template operator()<2>();
  } else if (rows <= 4) {
    body.template operator()<4>();
  } else if (rows <= 8) {
    body.template operator()<8>();
  } else {
    body.template operator()<16>();
  }
}

}  // namespace

void recurrent_gated_delta_rule(const GatedDeltaRuleForward& p, Stream stream) {
  if (p.K > kMaxKeySize) {
    throw std::invalid_argument("recurrent_gated_delta_rule: K must be at most 512, got " +
                                std::to_string(p.K));
  }
  if (p.N == 0 || p.HV == 0) return;
  const dim3 grid(static_cast<unsigned>(p.N * p.HV),
                  static_cast<unsigned>(divide_up(p.V, kColumns)));
  const auto aligned = [](const void* state) {
    return reinterpret_cast<uintptr_t>(state) % 16 == 0;
  };
  const bool vectors =
      (p.state_v_first ? p.K : p.V) % 4 == 0 && aligned(p.initial_state) && aligned(p.final_state);
  with_element_type(p.dtype, [&]<typename T>(T*) {
    const auto launch = [&]<bool kVFirst>() {
      with_rows<kVFirst>(p.K, [&]<int kRows>() {
        if (vectors) {
          recurrent_kernel<T, kVFirst, kRows, true><<<grid, kBlock, 0, stream>>>(p);
        } else {
          recurrent_kernel<T, kVFirst, kRows, false><<<grid, kBlock, 0, stream>>>(p);
        }
      });
    };
    if (p.state_v_first) {
      launch.template operator()<true>();
    } else {
      launch.template operator()<false>();
    }
  });
  check_launch("recurrent_gated_delta_rule");
}

}  // namespace gdn::kernels::cuda
