// A linear map of at most 8 rows. A tile is 8 weight rows, and a block's 8 warps split D among
// them; each warp multiplies them by all rows of x with tensor cores (m16n8k16, of whose 16 rows of
// x at most 8 are used), and the warps' parts are added in shared memory.
//
// The weight comes through a ring in shared memory, 16 bytes a lane, and each lane reads what it
// has fetched itself: no thread waits for another, and some stages are always in flight, across
// tiles. The first are fetched before the kernel waits for the one before it, beside which it fits
// on a multiprocessor.
//
// A norm of whole rows multiplies x by its weight alone on the way in, and the products by the
// row's factor on the way out. One of smaller groups needs their factors first, which takes longer.
//
// A 16-byte piece holds 8 neighbours of a weight row, where the instruction wants elements 2t, 2t+1
// and 2t+8, 2t+9 of 16 from lane t: which elements those are does not matter to the sum, as long as
// x is taken in the same order.
#include <gdn/kernels/cuda/device.cuh>
#include <gdn/kernels/cuda/overlap.cuh>
#include <gdn/kernels/cuda/small_batch_linear.h>
#include <gdn/kernels/cuda/small_batch_linear_plan.h>

namespace gdn::kernels::cuda {
namespace {

constexpr int kBlock = kWarp * kLinearWarps;
constexpr int kWarps = kLinearWarps, kRows = kLinearRows, kPiece = kLinearPiece;
constexpr int kStep = kLinearStep, kStage = kLinearStage, kMaxTaps = kLinearMaxTaps;

struct Launch : SmallBatchLinear {
  SmallBatchLinearPlan plan;
};

template <typename T>
__device__ __forceinline__ void multiply(float (&c)[4], uint32_t x0, uint32_t x1, uint32_t w0,
                                         uint32_t w1);
template <>
__device__ __forceinline__ void multiply<__nv_bfloat16>(float (&c)[4], uint32_t x0, uint32_t x1,
                                                        uint32_t w0, uint32_t w1) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%5}, "
      "{%7,%8}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(x0), "r"(0), "r"(x1), "r"(w0), "r"(w1));
#endif
}
template <>
__device__ __forceinline__ void multiply<__half>(float (&c)[4], uint32_t x0, uint32_t x1,
                                                 uint32_t w0, uint32_t w1) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%5}, "
      "{%7,%8}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(x0), "r"(0), "r"(x1), "r"(w0), "r"(w1));
#endif
}

/// Fetches a piece, or zeros, into shared memory.
__device__ __forceinline__ void fetch_piece(uint4* shared, const void* global, bool real) {
#if __CUDA_ARCH__ >= 800
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global),
               "r"(real ? 16 : 0)
               : "memory");
#endif
}

/// Ends a stage's fetches.
__device__ __forceinline__ void end_stage() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

/// Waits for this thread's fetches of all but the last kStages stages.
template <int kStages>
__device__ __forceinline__ void wait_for_stages() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kStages) : "memory");
#endif
}

/// The weight row that a warp's lanes 4g to 4g + 3 multiply. With SwiGLU, a tile has 4 rows of the
/// gate and their 4 rows of the other half.
__device__ __forceinline__ int64_t weight_row(const Launch& p, int64_t tile, int g) {
  if (!p.swiglu) return min(tile * kRows + g, p.N - 1);
  const int64_t n = min(tile * (kRows / 2) + g % (kRows / 2), p.N - 1);
  return g < kRows / 2 ? n : p.N + n;
}

using Norm = SmallBatchLinearPlan::Norm;

/// Brings z to shared memory, [M, stride], with zeros behind D. A thread loads kBatch pieces, one
/// behind the other, before it uses any.
template <typename T, Norm kNorm>
class Rows {
 public:
  /// Reads what may be read before the kernel waits.
  __device__ explicit Rows(const Launch& p)
      : p_(p),
        pieces_(static_cast<int>(p.D / kPiece)),
        all_(static_cast<int>(p.M) * pieces_),
        group_(static_cast<int>(p.norm_size / kPiece)),
        unit_(group_ % kWarp == 0 ? kWarp : 1) {
    if constexpr (kNorm != Norm::none) load_norms(threadIdx.x);
  }

  /// `sums` has room for a float a piece.
  __device__ void load(T* z, float* sums) {
    if constexpr (kNorm == Norm::groups) load_gates(threadIdx.x);
    for (int first = threadIdx.x; first < all_; first += kBatch * kBlock) {
      uint4 x[kBatch];
      load_batch(p_.x, first, x);
      if (kNorm == Norm::rows && first >= kBatch * kBlock) load_norms(first);
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        if (first + j * kBlock < all_) copy(z, sums, first + j * kBlock, x[j], norms_[j]);
      }
    }
    const int behind = kWarps * p_.plan.slice - static_cast<int>(p_.D);
    for (int i = threadIdx.x; i < p_.M * behind; i += kBlock) {
      z[i / behind * p_.plan.stride + p_.D + i % behind] = from_float<T>(0.0F);
    }
    __syncthreads();
    if constexpr (kNorm == Norm::groups) {
      for (int first = threadIdx.x; first < all_; first += kBatch * kBlock) {
        if (first >= kBatch * kBlock) {
          load_norms(first);
          load_gates(first);
        }
#pragma unroll
        for (int j = 0; j < kBatch; ++j) {
          const int i = first + j * kBlock;
          if (i < all_) scale(in_shared(z, i), factor(sums, i / group_), norms_[j], gates_[j]);
        }
      }
      __syncthreads();
    }
  }

  /// Of a group of all rows' groups; for whole rows, of row m.
  __device__ float factor(const float* sums, int group) const {
    const int units = group_ / unit_;
    float sum = 0.0F;
#pragma unroll 8
    for (int unit = 0; unit < units; ++unit) sum += sums[group * units + unit];
    return 1.0F / sqrtf(sum / static_cast<float>(p_.norm_size) + static_cast<float>(p_.eps));
  }

 private:
  // As many as registers allow beside the ring's pieces.
  static constexpr int kBatch = kNorm == Norm::none ? 8 : kNorm == Norm::rows ? 4 : 2;

  __device__ void load_batch(const ConstView2& rows, int first, uint4 (&batch)[kBatch]) const {
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int i = first + j * kBlock;
      if (i >= all_) continue;
      batch[j] = *reinterpret_cast<const uint4*>(static_cast<const T*>(rows.data) +
                                                 i / pieces_ * rows.stride + i % pieces_ * kPiece);
    }
  }
  __device__ void load_norms(int first) {
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int i = first + j * kBlock;
      if (i < all_) norms_[j] = static_cast<const uint4*>(p_.norm_weight)[i % group_];
    }
  }
  __device__ void load_gates(int first) {
    if (p_.gate.data != nullptr) load_batch(p_.gate, first, gates_);
  }
  __device__ T* in_shared(T* z, int i) const {
    return z + i / pieces_ * p_.plan.stride + i % pieces_ * kPiece;
  }

  /// Piece i of x, times the weight of a norm of whole rows; and the sum of its squares or, where
  /// groups hold whole warps of pieces, of the warp's.
  __device__ void copy(T* z, float* sums, int i, const uint4& raw, const uint4& norm) const {
    if constexpr (kNorm == Norm::none) {
      *reinterpret_cast<uint4*>(in_shared(z, i)) = raw;
    } else {
      float x[kPiece], sum = 0.0F;
      cuda::load<kPiece>(reinterpret_cast<const T*>(&raw), x);
#pragma unroll
      for (int j = 0; j < kPiece; ++j) sum = fmaf(x[j], x[j], sum);
      if constexpr (kNorm == Norm::rows) {
        float w[kPiece];
        cuda::load<kPiece>(reinterpret_cast<const T*>(&norm), w);
#pragma unroll
        for (int j = 0; j < kPiece; ++j) x[j] *= w[j];
      }
      store<kPiece>(in_shared(z, i), x);
      if (unit_ == kWarp) sum = warp_sum(sum);
      sums[i / unit_] = sum;
    }
  }

  __device__ void scale(T* z, float r, const uint4& norm, const uint4& gate) const {
    float x[kPiece], w[kPiece], g[kPiece];
    cuda::load<kPiece>(z, x);
    cuda::load<kPiece>(reinterpret_cast<const T*>(&norm), w);
    cuda::load<kPiece>(reinterpret_cast<const T*>(&gate), g);
#pragma unroll
    for (int j = 0; j < kPiece; ++j) {
      x[j] *= r * w[j];
      if (p_.gate.data != nullptr) x[j] *= silu(g[j]);
    }
    store<kPiece>(z, x);
  }

  const Launch& p_;
  int pieces_, all_;  // of a row, of all
  int group_, unit_;  // pieces of a norm's group, and of a sum
  uint4 norms_[kBatch] = {}, gates_[kBatch] = {};
};

template <typename T>
__device__ __forceinline__ uint32_t bits(T x) {
  return *reinterpret_cast<const uint16_t*>(&x);
}
template <typename T>
__device__ __forceinline__ T from_bits(uint32_t x) {
  const auto low = static_cast<uint16_t>(x);
  return *reinterpret_cast<const T*>(&low);
}

/// What an output needs beside the products: read early, since it comes from far.
template <typename T>
struct Extras {
  float addend = 0.0F;  // residual, or the convolution's bias
  // Two to a register, right-aligned: fewer taps have zeros before them. The last input is new.
  uint32_t inputs[kMaxTaps / 2] = {}, taps[kMaxTaps / 2] = {};

  __device__ void load(const Launch& p, int64_t m, int64_t n) {
    const auto at = [](const void* data, int64_t i) { return static_cast<const T*>(data)[i]; };
    if (p.residual.data != nullptr) {
      addend = to_float(at(p.residual.data, m * p.residual.stride + n));
    }
    if (n >= p.channels) return;
    const int W = static_cast<int>(p.taps);
#pragma unroll
    for (int slot = 0; slot < kMaxTaps; ++slot) {
      const int w = slot - (kMaxTaps - W), shift = slot % 2 * 16;
      if (w < 0) continue;
      taps[slot / 2] |= bits(at(p.conv_weight, n * W + w)) << shift;
      if (slot == kMaxTaps - 1) continue;
      const int64_t state = (m * p.channels + n) * (W - 1) + w;
      inputs[slot / 2] |= bits(at(p.conv_state, state)) << shift;
    }
    if (p.conv_bias != nullptr) addend = to_float(at(p.conv_bias, n));
  }
};

/// The short convolution's output of channel n in row m for its newest input y; y joins the state.
template <typename T>
__device__ float convolve(const Launch& p, int64_t m, int64_t n, float y, const Extras<T>& extras) {
  const int W = static_cast<int>(p.taps);
  T* state = static_cast<T*>(p.conv_state) + (m * p.channels + n) * (W - 1);
  float sum = extras.addend;
#pragma unroll
  for (int slot = 0; slot < kMaxTaps; ++slot) {
    const int w = slot - (kMaxTaps - W), shift = slot % 2 * 16;
    const T input =
        slot == kMaxTaps - 1 ? from_float<T>(y) : from_bits<T>(extras.inputs[slot / 2] >> shift);
    sum = fmaf(to_float(from_bits<T>(extras.taps[slot / 2] >> shift)), to_float(input), sum);
    if (w > 0) state[w - 1] = input;
  }
  return silu(sum);
}

/// Writes output n of row m from the products of its weight rows.
template <typename T>
__device__ void finish(const Launch& p, int64_t m, int64_t n, float y, float other,
                       const Extras<T>& extras) {
  if (p.swiglu) {
    y = silu(to_float(from_float<T>(y))) * to_float(from_float<T>(other));
  } else if (n < p.channels) {
    y = convolve<T>(p, m, n, y, extras);
  } else {
    y += extras.addend;
  }
  static_cast<T*>(p.y.data)[m * p.y.stride + n] = from_float<T>(y);
}

/// Fetches a lane's pieces of the weight, stage by stage and tile by tile, kLinearDepth stages
/// ahead. The steps of a stage are waited for, read and fetched again together, so that their
/// latencies overlap.
template <typename T>
class Fetcher {
 public:
  __device__ Fetcher(const Launch& p, uint4* ring)
      : p_(p),
        ring_(ring + threadIdx.x),
        g_(threadIdx.x % kWarp / 4),
        column_(threadIdx.x / kWarp * p.plan.slice + threadIdx.x % 4 * kPiece),
        tile_(blockIdx.x) {
    find_row();
    for (int slot = 0; slot < kLinearDepth; ++slot) fetch(slot);
  }

  /// The pieces of the next stage, whose place is then refilled.
  __device__ void next(uint4 (&pieces)[kStage]) {
    wait_for_stages<kLinearDepth - 1>();
#pragma unroll
    for (int step = 0; step < kStage; ++step) pieces[step] = *place(slot_, step);
    fetch(slot_);
    slot_ = slot_ + 1 == kLinearDepth ? 0 : slot_ + 1;
  }

 private:
  __device__ uint4* place(int slot, int step) const {
    return ring_ + (slot * kStage + step) * kBlock;
  }

  __device__ void find_row() {
    row_ = static_cast<const T*>(p_.weight) + weight_row(p_, tile_, g_) * p_.D + column_;
  }

  __device__ void fetch(int slot) {
    if (tile_ < p_.plan.tiles) {
#pragma unroll
      for (int step = 0; step < kStage; ++step) {
        const int d = (stage_ * kStage + step) * kStep;
        const bool real = column_ + d < p_.D;
        fetch_piece(place(slot, step), real ? row_ + d : p_.weight, real);
      }
      if (++stage_ == p_.plan.stages) {
        stage_ = 0;
        tile_ += static_cast<int>(gridDim.x);
        find_row();
      }
    }
    end_stage();
  }

  const Launch& p_;
  uint4* ring_;
  int g_, column_;
  int tile_, stage_ = 0, slot_ = 0;
  const T* row_;
};

template <typename T, Norm kNorm>
__global__ void __launch_bounds__(kBlock, kLinearBlocks) small_batch_linear_kernel(Launch p) {
  extern __shared__ uint4 shared[];
  __shared__ float parts[2][kWarps][kRows * kRows];  // [warp][row of x, weight row]
  T* z = reinterpret_cast<T*>(shared + kLinearDepth * kStage * kBlock);
  float* sums = reinterpret_cast<float*>(z + p.M * p.plan.stride);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int g = lane / 4;  // of x's rows and of a tile's weight rows

  Fetcher<T> weight(p, shared);
  Rows<T, kNorm> rows(p);
  wait_for_previous();
  let_next_start();
  rows.load(z, sums);

  // The output that this thread finishes in a tile.
  const int m = threadIdx.x / kRows % kRows, n = threadIdx.x % kRows;
  const int outputs = p.swiglu ? kRows / 2 : kRows;  // of a tile
  const bool finishes = threadIdx.x < kRows * kRows && m < p.M && n < outputs;
  float factor = 1.0F;  // of the products
  if (kNorm == Norm::rows && finishes) factor = rows.factor(sums, m);
  const T* x_row = z + g * p.plan.stride + warp * p.plan.slice + lane % 4 * kPiece;
  int buffer = 0;
  for (int tile = blockIdx.x; tile < p.plan.tiles; tile += gridDim.x) {
    const int64_t output = int64_t{tile} * outputs + n;
    Extras<T> extras;
    if (finishes && output < p.N) extras.load(p, m, output);
    float c[2][4] = {};
    for (int stage = 0; stage < p.plan.stages; ++stage) {
      uint4 pieces[kStage], x[kStage] = {};
      weight.next(pieces);
#pragma unroll
      for (int step = 0; step < kStage; ++step) {
        if (g < p.M) {
          x[step] = *reinterpret_cast<const uint4*>(x_row + (stage * kStage + step) * kStep);
        }
      }
#pragma unroll
      for (int step = 0; step < kStage; ++step) {
        multiply<T>(c[0], x[step].x, x[step].y, pieces[step].x, pieces[step].y);
        multiply<T>(c[1], x[step].z, x[step].w, pieces[step].z, pieces[step].w);
      }
    }
    *reinterpret_cast<float2*>(&parts[buffer][warp][g * kRows + lane % 4 * 2]) =
        make_float2(c[0][0] + c[1][0], c[0][1] + c[1][1]);
    __syncthreads();
    if (finishes && output < p.N) {
      float y = 0.0F, other = 0.0F;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        y += parts[buffer][w][threadIdx.x];
        if (p.swiglu) other += parts[buffer][w][threadIdx.x + kRows / 2];
      }
      finish<T>(p, m, output, y * factor, other * factor, extras);
    }
    buffer = 1 - buffer;  // the next tile's parts go where nobody reads any more
  }
}

template <typename T, Norm kNorm>
void launch_kernel(const Launch& p, Stream stream) {
  const auto kernel = small_batch_linear_kernel<T, kNorm>;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                       static_cast<int>(p.plan.shared_bytes));
  const int64_t blocks = int64_t{kLinearBlocks} * device_attribute(cudaDevAttrMultiProcessorCount);
  launch(kernel, dim3(static_cast<unsigned>(std::min<int64_t>(p.plan.tiles, blocks))), kBlock,
         static_cast<size_t>(p.plan.shared_bytes), stream, p.overlap, p);
}

template <typename T>
void launch_norm(const SmallBatchLinear& parameters, Stream stream) {
  const Launch p{parameters, plan_small_batch_linear(parameters)};
  switch (p.plan.norm) {
    case Norm::none:
      return launch_kernel<T, Norm::none>(p, stream);
    case Norm::rows:
      return launch_kernel<T, Norm::rows>(p, stream);
    case Norm::groups:
      return launch_kernel<T, Norm::groups>(p, stream);
  }
}

}  // namespace

void small_batch_linear(const SmallBatchLinear& p, Stream stream) {
  if (p.dtype == DType::bf16) {
    launch_norm<__nv_bfloat16>(p, stream);
  } else {
    launch_norm<__half>(p, stream);
  }
  check_launch("small_batch_linear");
}

}  // namespace gdn::kernels::cuda
