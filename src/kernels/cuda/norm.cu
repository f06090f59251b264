// RMSNorm, gated RMSNorm and L2 norm: half a warp, a warp or a block a row, by its length. Several
// rows are on their way at once. Rows that fit the registers are read once; of longer ones the
// second read comes from the cache.
//
// Backward, blocks loop over fixed rows, and each thread sums the gradients of its own columns'
// weights on the way.
#include <gdn/kernels/cuda/column_sums.cuh>
#include <gdn/kernels/cuda/norm.h>

namespace gdn::kernels::cuda {
namespace {

constexpr int kBlock = 256;

/// How rows lie on threads. A thread holds kPieces vectors of kCount elements of each row at once,
/// kThreads kCount apart; kOnce: they are the whole row.
template <typename Element_, int kCount_, int kThreads_, int kPieces_, bool kOnce_>
struct Layout {
  using Element = Element_;
  static constexpr int kCount = kCount_, kThreads = kThreads_, kPieces = kPieces_;
  static constexpr bool kOnce = kOnce_;
  static constexpr int kGroups = kBlock / kThreads;  // of threads that share a row, of a block
  static constexpr int kStep = kThreads * kCount;    // from a piece to the next
  static constexpr int kColumns = kStep * kPieces;

  /// Rows of a thread at once, so that about `vectors` vectors of all tensors are on their way.
  static __host__ __device__ constexpr int rows(int vectors, int tensors) {
    const int rows = kOnce ? vectors / (tensors * kPieces) : 1;
    return rows < 1 ? 1 : rows;
  }
  static __device__ int first() { return static_cast<int>(threadIdx.x) % kThreads * kCount; }
  static __device__ int group() { return static_cast<int>(threadIdx.x) / kThreads; }
};

/// What a thread holds of kRows rows of a tensor, from column i on, as it was loaded; zeros beyond
/// the last row and column.
template <typename L, int kRows>
struct Tile {
  using Piece = Vector<typename L::Element, L::kCount>;
  Piece pieces[kRows][L::kPieces];

  __device__ void load(const ConstView2& view, const NormProblem& p, int64_t row, int64_t i) {
    const auto* data = static_cast<const typename L::Element*>(view.data);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int64_t m = row + r * L::kGroups;
#pragma unroll
      for (int k = 0; k < L::kPieces; ++k) {
        const int64_t column = i + k * L::kStep;
        pieces[r][k] = {};
        if (m < p.M && column < p.D) {
          const auto* from = data + m * view.stride + column;
          pieces[r][k].word = *reinterpret_cast<const typename Piece::Word*>(from);
        }
      }
    }
  }

  /// The sum takes the element's precision.
  __device__ void add(const Tile& other) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int k = 0; k < L::kPieces; ++k) {
        float sum[L::kCount], summand[L::kCount];
        unpack(pieces[r][k], sum);
        unpack(other.pieces[r][k], summand);
#pragma unroll
        for (int j = 0; j < L::kCount; ++j) sum[j] += summand[j];
        pieces[r][k] = pack<typename L::Element>(sum);
      }
    }
  }
};

/// The weights of a thread's columns from i on; ones where there are none.
template <typename L>
__device__ void load_weight(const NormProblem& p, int64_t i,
                            float (&weight)[L::kPieces][L::kCount]) {
#pragma unroll
  for (int k = 0; k < L::kPieces; ++k) {
#pragma unroll
    for (int j = 0; j < L::kCount; ++j) weight[k][j] = 1.0F;
    const int64_t column = i + k * L::kStep;
    if (p.weight != nullptr && column < p.D) {
      load_parameter<typename L::Element>(p.weight, p.weight_dtype, column, weight[k]);
    }
  }
}

template <typename L>
__device__ void store_piece(const MutableView2& view, int64_t m, int64_t column,
                            const float (&x)[L::kCount]) {
  store<L::kCount>(static_cast<typename L::Element*>(view.data) + m * view.stride + column, x);
}

__device__ float per_row(const NormProblem& p) {
  return p.kind == NormKind::rms ? 1.0F / static_cast<float>(p.D) : 1.0F;
}

__device__ float row_factor(const NormProblem& p, float squares) {
  return 1.0F / sqrtf(squares * per_row(p) + static_cast<float>(p.eps));
}

template <typename L, bool kGated>
__global__ void __launch_bounds__(kBlock) norm_kernel(NormForward p) {
  constexpr int kRows = L::rows(4, kGated ? 2 : 1);
  const int64_t row = int64_t{blockIdx.x} * L::kGroups * kRows + L::group();
  const bool adds = !kGated && p.residual.data != nullptr;
  Tile<L, kRows> x, gate;
  float weight[L::kPieces][L::kCount];
  float factor[kRows] = {};  // first the sums of squares
  const auto load = [&](int64_t i) {
    x.load(p.x, p, row, i);
    if constexpr (kGated) gate.load(p.gate, p, row, i);
    if (adds) {
      Tile<L, kRows> residual;
      residual.load(p.residual, p, row, i);
      x.add(residual);
    }
    load_weight<L>(p, i, weight);
  };
  for (int64_t i = L::first(); i < p.D || L::kOnce; i += L::kColumns) {
    load(i);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int k = 0; k < L::kPieces; ++k) {
        float values[L::kCount];
        unpack(x.pieces[r][k], values);
#pragma unroll
        for (int j = 0; j < L::kCount; ++j) factor[r] = fmaf(values[j], values[j], factor[r]);
      }
    }
    if constexpr (L::kOnce) break;
  }
  row_sums<L::kThreads>(factor);
#pragma unroll
  for (int r = 0; r < kRows; ++r) factor[r] = row_factor(p, factor[r]);
  for (int64_t i = L::first(); i < p.D; i += L::kColumns) {
    if constexpr (!L::kOnce) load(i);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int64_t m = row + r * L::kGroups;
#pragma unroll
      for (int k = 0; k < L::kPieces; ++k) {
        const int64_t column = i + k * L::kStep;
        if (m >= p.M || column >= p.D) continue;
        float y[L::kCount];
        unpack(x.pieces[r][k], y);
        if (adds) store_piece<L>(p.sum, m, column, y);
#pragma unroll
        for (int j = 0; j < L::kCount; ++j) y[j] *= factor[r] * weight[k][j];
        if constexpr (kGated) {
          float z[L::kCount];
          unpack(gate.pieces[r][k], z);
#pragma unroll
          for (int j = 0; j < L::kCount; ++j) y[j] *= silu(z[j]);
        }
        store_piece<L>(p.y, m, column, y);
      }
    }
    if constexpr (L::kOnce) break;
  }
}

/// Blocks a multiprocessor of the backward kernel, all of which run at once.
constexpr int backward_blocks(bool gated) { return gated ? 2 : 3; }

/// parts [blocks, D], or null: the sums of d_y silu(gate) x r over the rows of each block.
template <typename L, bool kGated>
__global__ void __launch_bounds__(kBlock, backward_blocks(kGated))
    norm_backward_kernel(NormBackward p, float* parts) {
  constexpr int kRows = L::rows(kGated ? 8 : 4, kGated ? 3 : 2);  // what the registers hold
  const int first = L::first();
  float weight[L::kPieces][L::kCount], d_weight[L::kPieces][L::kCount] = {};
  if constexpr (L::kOnce) load_weight<L>(p, first, weight);
  bool first_rows = true;
  for (int64_t row = int64_t{blockIdx.x} * L::kGroups * kRows; row < p.M;
       row += int64_t{gridDim.x} * L::kGroups * kRows) {
    Tile<L, kRows> x, d_y, gate, d_sum = {};
    float active[kRows][L::kPieces][L::kCount];  // the gates' sigmoids
    float sums[2 * kRows] = {};                  // of x x, and of h x
    const auto load = [&](int64_t i) {
      x.load(p.x, p, row + L::group(), i);
      d_y.load(p.d_y, p, row + L::group(), i);
      if constexpr (kGated) gate.load(p.gate, p, row + L::group(), i);
      if (!kGated && p.d_sum.data != nullptr) d_sum.load(p.d_sum, p, row + L::group(), i);
      if constexpr (!L::kOnce) load_weight<L>(p, i, weight);
    };
    for (int64_t i = first; i < p.D || L::kOnce; i += L::kColumns) {
      load(i);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int k = 0; k < L::kPieces; ++k) {
          float values[L::kCount], h[L::kCount];
          unpack(x.pieces[r][k], values);
          unpack(d_y.pieces[r][k], h);
          if constexpr (kGated) {
            float z[L::kCount];
            unpack(gate.pieces[r][k], z);
#pragma unroll
            for (int j = 0; j < L::kCount; ++j) {
              active[r][k][j] = sigmoid(z[j]);
              h[j] *= z[j] * active[r][k][j];
            }
          }
#pragma unroll
          for (int j = 0; j < L::kCount; ++j) {
            sums[r] = fmaf(values[j], values[j], sums[r]);
            sums[kRows + r] = fmaf(h[j] * weight[k][j], values[j], sums[kRows + r]);
          }
        }
      }
      if constexpr (L::kOnce) break;
    }
    row_sums<L::kThreads>(sums);
    float factor[kRows], mean[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      factor[r] = row_factor(p, sums[r]);
      mean[r] = sums[kRows + r] * factor[r] * per_row(p);
    }
    for (int64_t i = first; i < p.D; i += L::kColumns) {
      if constexpr (!L::kOnce) {
        load(i);
#pragma unroll
        for (int k = 0; k < L::kPieces; ++k) {
#pragma unroll
          for (int j = 0; j < L::kCount; ++j) d_weight[k][j] = 0.0F;
        }
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int64_t m = row + L::group() + r * L::kGroups;
#pragma unroll
        for (int k = 0; k < L::kPieces; ++k) {
          const int64_t column = i + k * L::kStep;
          if (m >= p.M || column >= p.D) continue;
          float normed[L::kCount], h[L::kCount];
          unpack(x.pieces[r][k], normed);
          unpack(d_y.pieces[r][k], h);
#pragma unroll
          for (int j = 0; j < L::kCount; ++j) normed[j] *= factor[r];
          if constexpr (kGated) {
            float z[L::kCount], d_gate[L::kCount];
            unpack(gate.pieces[r][k], z);
#pragma unroll
            for (int j = 0; j < L::kCount; ++j) {
              const float s = L::kOnce ? active[r][k][j] : sigmoid(z[j]);
              d_gate[j] = h[j] * weight[k][j] * normed[j] * silu_gradient(z[j], s);
              h[j] *= z[j] * s;
            }
            store_piece<L>(p.d_gate, m, column, d_gate);
          }
          float d_x[L::kCount];
          unpack(d_sum.pieces[r][k], d_x);
#pragma unroll
          for (int j = 0; j < L::kCount; ++j) {
            d_weight[k][j] = fmaf(h[j], normed[j], d_weight[k][j]);
            d_x[j] = fmaf(factor[r], h[j] * weight[k][j] - normed[j] * mean[r], d_x[j]);
          }
          store_piece<L>(p.d_x, m, column, d_x);
        }
      }
      if constexpr (L::kOnce) break;
      if (parts == nullptr) continue;
      static_assert(L::kOnce || L::kGroups == 1);
#pragma unroll
      for (int k = 0; k < L::kPieces; ++k) {
#pragma unroll
        for (int j = 0; j < L::kCount; ++j) {
          const int64_t column = i + k * L::kStep + j;
          if (column >= p.D) continue;
          float* sum = parts + blockIdx.x * p.D + column;
          *sum = first_rows ? d_weight[k][j] : *sum + d_weight[k][j];
        }
      }
    }
    first_rows = false;
  }
  if (parts == nullptr || !L::kOnce) return;
  // The sums of the groups of the block, column by column.
  if constexpr (L::kOnce) {
    __shared__ float groups[L::kGroups][L::kColumns];
#pragma unroll
    for (int k = 0; k < L::kPieces; ++k) {
#pragma unroll
      for (int j = 0; j < L::kCount; ++j) {
        groups[L::group()][first + k * L::kStep + j] = d_weight[k][j];
      }
    }
    __syncthreads();
    for (int column = static_cast<int>(threadIdx.x); column < p.D; column += kBlock) {
      float sum = 0.0F;
#pragma unroll
      for (int g = 0; g < L::kGroups; ++g) sum += groups[g][column];
      parts[blockIdx.x * p.D + column] = sum;
    }
  }
}

struct WriteWeightGradient {
  float* d_weight;
  __device__ void operator()(int64_t column, float sum) const { d_weight[column] = sum; }
};

/// Calls body with the layout of the problem's rows.
template <typename Body>
void with_layout(const NormProblem& p, const auto& aligned, const Body& body) {
  with_element_type(p.dtype, [&]<typename T>(T*) {
    const auto call = [&]<int kCount, int kThreads, int kPieces, bool kOnce = true>() {
      body.template operator()<Layout<T, kCount, kThreads, kPieces, kOnce>>();
    };
    constexpr int kCount = kVector<T>;
    if (p.D % kCount != 0 || !aligned.template operator()<T>()) {
      if (p.D <= 4 * kWarp) return call.template operator()<1, kWarp, 4>();
      return call.template operator()<1, kBlock, 4, false>();
    }
    if (p.D <= kCount * kWarp / 2) return call.template operator()<kCount, kWarp / 2, 1>();
    if (p.D <= kCount * kWarp) return call.template operator()<kCount, kWarp, 1>();
    if (p.D <= kCount * kWarp * 2) return call.template operator()<kCount, kWarp, 2>();
    if (p.D <= kCount * kBlock / 2) return call.template operator()<kCount, kBlock / 2, 1>();
    if (p.D <= kCount * kBlock) return call.template operator()<kCount, kBlock, 1>();
    if (p.D <= kCount * kBlock * 2) return call.template operator()<kCount, kBlock, 2>();
    call.template operator()<kCount, kBlock, 2, false>();
  });
}

template <typename T>
bool inputs_aligned(const NormProblem& p) {
  return rows_aligned<T>(p.x.data, p.x.stride, 16) && rows_aligned<T>(p.weight, 0, 16) &&
         (p.gate.data == nullptr || rows_aligned<T>(p.gate.data, p.gate.stride, 16));
}

/// Parts of the gradient of the weight: as many blocks as run at once.
int64_t part_count(const NormProblem& p) {
  return std::min<int64_t>(p.M, multiprocessors() * backward_blocks(p.gate.data != nullptr));
}

}  // namespace

void norm(const NormForward& p, Stream stream) {
  if (p.M == 0 || p.D == 0) return;
  const auto aligned = [&]<typename T>() {
    return inputs_aligned<T>(p) && rows_aligned<T>(p.y.data, p.y.stride, 16) &&
           rows_aligned<T>(p.residual.data, p.residual.stride, 16) &&
           rows_aligned<T>(p.sum.data, p.sum.stride, 16);
  };
  with_layout(p, aligned, [&]<typename L>() {
    const auto launch = [&]<bool kGated>() {
      constexpr int kRows = L::kGroups * L::rows(4, kGated ? 2 : 1);
      norm_kernel<L, kGated>
          <<<static_cast<unsigned>(divide_up(p.M, kRows)), kBlock, 0, stream>>>(p);
    };
    p.gate.data == nullptr ? launch.template operator()<false>()
                           : launch.template operator()<true>();
  });
  check_launch("norm");
}

int64_t norm_backward_scratch(const NormBackward& p) {
  return p.d_weight == nullptr ? 0 : scratch_floats(part_count(p) * p.D);
}

void norm_backward(const NormBackward& p, void* scratch, Stream stream) {
  if (p.D == 0) return;
  auto* parts = p.d_weight == nullptr ? nullptr : static_cast<float*>(scratch);
  const auto aligned = [&]<typename T>() {
    return inputs_aligned<T>(p) && rows_aligned<T>(p.d_y.data, p.d_y.stride, 16) &&
           rows_aligned<T>(p.d_x.data, p.d_x.stride, 16) &&
           rows_aligned<T>(p.d_sum.data, p.d_sum.stride, 16) &&
           (p.gate.data == nullptr || rows_aligned<T>(p.d_gate.data, p.d_gate.stride, 16));
  };
  const int64_t count = part_count(p);
  if (p.M > 0) {
    const auto blocks = static_cast<unsigned>(count);
    with_layout(p, aligned, [&]<typename L>() {
      p.gate.data == nullptr
          ? norm_backward_kernel<L, false><<<blocks, kBlock, 0, stream>>>(p, parts)
          : norm_backward_kernel<L, true><<<blocks, kBlock, 0, stream>>>(p, parts);
    });
    check_launch("norm_backward");
  }
  if (p.d_weight == nullptr) return;
  add_parts(parts, count, p.D, stream, WriteWeightGradient{static_cast<float*>(p.d_weight)});
}

}  // namespace gdn::kernels::cuda
