// Scratch memory and launches that the portable chunked forward and backward share.
#pragma once

#include <vector>

#include <gdn/kernels/cuda/gated_delta_rule_matrices.cuh>
#include <gdn/kernels/cuda/gated_delta_rule_scan.cuh>

namespace gdn::kernels::cuda {

inline void check_key_size(const GatedDeltaRuleProblem& p, const char* kernel) {
  if (p.K > kMaxKeySize) {
    throw std::invalid_argument(std::string(kernel) + ": K must be at most " +
                                std::to_string(kMaxKeySize) + ", got " + std::to_string(p.K));
  }
}

/// Where the arrays of a wave lie in scratch memory. `describe(add, chunks, group)` calls
/// add(member of Wave, floats of a pair) for each.
class ScratchLayout {
 public:
  template <typename Describe>
  ScratchLayout(const GatedDeltaRuleProblem& p, int64_t longest, const Describe& describe)
      : pairs_(p.N * p.H) {
    const auto arrays = [&](int64_t chunks) {
      std::vector<Array> result;
      const auto add = [&](float* Wave::*member, int64_t floats) {
        result.push_back({member, floats});
      };
      describe(add, chunks, p.H == 0 ? 0 : p.HV / p.H);
      return result;
    };
    wave_.plan = plan_waves(p, longest, [&](int64_t chunks) {
      int64_t floats = 0;
      for (const Array& array : arrays(chunks)) floats += array.floats;
      return floats * 4;
    });
    arrays_ = arrays(wave_.plan.chunks);
  }

  int64_t bytes() const {
    int64_t total = 0;
    for (const Array& array : arrays_) total += scratch_floats(array.floats * wave_.plan.pairs);
    return total;
  }

  /// A wave whose arrays lie in `scratch`.
  Wave wave(void* scratch) const {
    Wave w = wave_;
    auto* next = static_cast<float*>(scratch);
    for (const Array& array : arrays_) {
      w.*array.member = next;
      next += scratch_floats(array.floats * w.plan.pairs) / 4;
    }
    return w;
  }

  /// Points w to a group; returns how many pairs it has.
  int64_t select(int64_t group, Wave& w) const {
    w.first_pair = group * w.plan.pairs;
    return std::min(w.plan.pairs, pairs_ - w.first_pair);
  }

 private:
  struct Array {
    float* Wave::*member;
    int64_t floats;  // of a pair
  };
  int64_t pairs_;
  Wave wave_;
  std::vector<Array> arrays_;
};

template <typename T, typename Void>
bool view_aligned(const View4<Void>& view, int64_t bytes = 16) {
  return rows_aligned<T>(view.data, view.stride_b, bytes) &&
         rows_aligned<T>(view.data, view.stride_t, bytes) &&
         rows_aligned<T>(view.data, view.stride_h, bytes);
}

/// How the inputs may be read, and the `values`: all tensors of V that the pass reads or writes
/// beside v.
template <typename T, typename... Views>
void set_vectors(const GatedDeltaRuleProblem& p, Wave& w, const Views&... values) {
  constexpr int64_t kPair = 2 * sizeof(T);
  w.q_vectors = view_aligned<T>(p.q);
  w.k_vectors = view_aligned<T>(p.k);
  w.value_pairs =
      p.V % 2 == 0 && view_aligned<T>(p.v, kPair) && (view_aligned<T>(values, kPair) && ...);
}

/// Launches with `bytes` of shared memory, more than 48 KB too.
template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, int64_t bytes,
            cudaStream_t stream, const Arguments&... arguments) {
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                       static_cast<int>(bytes));
  kernel<<<grid, kTileThreads, bytes, stream>>>(arguments...);
  check_launch(name);
}

/// Shared memory that a block of the current device may have.
inline int64_t shared_memory_limit() {
  int device = 0, bytes = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  check_launch("shared memory of the device");
  return bytes;
}

/// Calls body with the scan's kTiles as a constant.
template <typename Body>
void with_scan_tiles(int64_t K, const Body& body) {
  switch (scan_tiles(K, shared_memory_limit())) {
    case 4:
      return body.template operator()<4>();
    case 2:
      return body.template operator()<2>();
    default:
      return body.template operator()<1>();
  }
}

/// Blocks of V columns, then slots.
template <int kTiles>
dim3 scan_grid(const GatedDeltaRuleProblem& p, int64_t pairs) {
  return dim3(static_cast<unsigned>(divide_up(p.V, ScanMemory<kTiles>::kColumns)),
              static_cast<unsigned>(pairs * (p.HV / p.H)));
}

template <typename T, bool kBackward>
void launch_matrices(const GatedDeltaRuleProblem& p, const Wave& w, int64_t pairs,
                     cudaStream_t stream) {
  if (w.plan.chunks == 0) return;
  const auto y = static_cast<unsigned>(pairs);
  const auto chunks = static_cast<unsigned>(w.plan.chunks);
  if (p.qk_l2norm) {
    const dim3 grid(chunks * (kChunk / (kTileThreads / kWarp)), y);
    launch("l2_factors", l2_factors_kernel<T>, grid, 0, stream, p, w);
  }
  launch("chunk_matrices", chunk_matrices_kernel<T, kBackward>, dim3(chunks, y),
         sizeof(MatricesMemory), stream, p, w);
}

template <typename T, bool kReplay>
void launch_scan(const GatedDeltaRuleForward& p, const Wave& w, int64_t pairs,
                 const float* kept_states, cudaStream_t stream) {
  with_scan_tiles(p.K, [&]<int kTiles>() {
    launch("scan", scan_kernel<T, kTiles, kReplay>, scan_grid<kTiles>(p, pairs),
           scan_bytes(p.K, kTiles), stream, p, w, kept_states);
  });
}

}  // namespace gdn::kernels::cuda
