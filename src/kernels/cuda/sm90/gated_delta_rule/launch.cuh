// Tensor maps, arguments and launch of the Hopper forward.
#pragma once

#include <cuda_runtime.h>
#include <stdexcept>
#include <string>

#include <gdn/kernels/cuda/gated_delta_rule.h>
#include <gdn/kernels/cuda/sm90/gated_delta_rule/forward.cuh>
#include <gdn/kernels/cuda/sm90/gated_delta_rule/pieces.cuh>

namespace gdn::kernels::cuda::sm90 {

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
  }
}

inline int multiprocessors() {
  int device = 0;
  int count = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device),
        "cudaDeviceGetAttribute");
  return count;
}

/// A [B, T, heads, width] tensor of 16-bit elements in boxes of 64 tokens x 64 elements; elements
/// beyond `width` are read as zeros and not written.
inline CUtensorMap tensor_map(const void* data, DType dtype, int64_t B, int64_t T, int64_t heads,
                              int64_t width, int64_t stride_b, int64_t stride_t, int64_t stride_h) {
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                           cudaEnableDefault, &found),
          "cudaGetDriverEntryPointByVersion");
    if (found != cudaDriverEntryPointSuccess) {
      throw std::runtime_error("the CUDA driver has no cuTensorMapEncodeTiled");
    }
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  constexpr cuuint64_t kBytes = 2;
  const cuuint64_t sizes[4] = {static_cast<cuuint64_t>(width), static_cast<cuuint64_t>(heads),
                               static_cast<cuuint64_t>(T), static_cast<cuuint64_t>(B)};
  const cuuint64_t strides[3] = {static_cast<cuuint64_t>(stride_h) * kBytes,
                                 static_cast<cuuint64_t>(stride_t) * kBytes,
                                 static_cast<cuuint64_t>(stride_b) * kBytes};
  const cuuint32_t box[4] = {kHalf, 1, kChunk, 1};
  const cuuint32_t steps[4] = {1, 1, 1, 1};
  CUtensorMap map;
  const CUresult result = encode(
      &map,
      dtype == DType::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 4,
      const_cast<void*>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error("cuTensorMapEncodeTiled: error " + std::to_string(result));
  }
  return map;
}

/// The map of a [B, T, heads, width] tensor of a problem.
template <typename Void>
CUtensorMap tensor_map(const GatedDeltaRuleProblem& p, const View4<Void>& view, int64_t heads,
                       int64_t width = kHeadDim) {
  // A map's dimensions are at least 1; an empty problem reads nothing.
  return tensor_map(view.data, p.dtype, p.B, p.T > 0 ? p.T : 1, heads, width, view.stride_b,
                    view.stride_t, view.stride_h);
}

inline void set_problem(const GatedDeltaRuleProblem& p, ProblemArguments& arguments) {
  arguments.q = tensor_map(p, p.q, p.H, p.K);
  arguments.k = tensor_map(p, p.k, p.H, p.K);
  arguments.v = tensor_map(p, p.v, p.HV, p.V);
  arguments.q_view = p.q;
  arguments.k_view = p.k;
  arguments.v_view = p.v;
  arguments.g = static_cast<const float*>(p.g);
  arguments.beta = static_cast<const float*>(p.beta);
  arguments.cu_seqlens = p.cu_seqlens;
  arguments.T = p.T;
  arguments.N = static_cast<int>(p.N);
  arguments.H = static_cast<int>(p.H);
  arguments.HV = static_cast<int>(p.HV);
  arguments.all_heads = arguments.HV;
  arguments.window_begin = 0;
  arguments.window_tokens = kWholeSequence;
  arguments.K = static_cast<int>(p.K);
  arguments.V = static_cast<int>(p.V);
  arguments.scale = static_cast<float>(p.scale);
  arguments.state_v_first = p.state_v_first;
}

inline ForwardArguments forward_arguments(const GatedDeltaRuleForward& p) {
  ForwardArguments arguments{};
  set_problem(p, arguments);
  arguments.o = tensor_map(p, p.o, p.HV, p.V);
  arguments.o_view = p.o;
  arguments.initial_state = static_cast<const float*>(p.initial_state);
  arguments.final_state = static_cast<float*>(p.final_state);
  arguments.segment_states = p.segment_states;
  return arguments;
}

/// Whether a kernel's blocks may start while the kernel before still runs; it must call
/// wait_for_previous_kernel() then.
enum class Start { kAfterPrevious, kEarly };

template <typename Arguments>
void launch(void (*kernel)(Arguments), const Arguments& arguments, int64_t blocks, int threads,
            size_t shared_bytes, const char* name, Stream stream,
            Start start = Start::kAfterPrevious) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(shared_bytes)),
        name);
  // As much as there is, whatever the driver would leave to the cache: two blocks may fit.
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                             cudaSharedmemCarveoutMaxShared),
        name);
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t configuration{};
  configuration.gridDim = static_cast<unsigned>(blocks);
  configuration.blockDim = static_cast<unsigned>(threads);
  configuration.dynamicSmemBytes = shared_bytes;
  configuration.stream = stream;
  configuration.attrs = &early;
  configuration.numAttrs = start == Start::kEarly ? 1 : 0;
  check(cudaLaunchKernelEx(&configuration, kernel, arguments), name);
}

/// run(needs) with the least of them that serves the problem.
template <typename Run>
void with_needs(const ForwardArguments& p, Run run) {
  if (p.K != kHeadDim || p.V != kHeadDim) {
    run(AnySizes());
  } else if (p.segment_states != nullptr) {
    run(WholeHeadsAndSegments());
  } else {
    run(WholeHeads());
  }
}

template <typename Element, Roles kRoles = Roles::kAll>
void launch_forward(const ForwardArguments& arguments, Stream stream) {
  const int64_t slices = (arguments.V + kHeadDim - 1) / kHeadDim;
  with_needs(arguments, [&](auto needs) {
    launch(gated_delta_rule_forward_kernel<Element, decltype(needs), kRoles>, arguments,
           int64_t{arguments.N} * arguments.HV * slices, kThreads, sizeof(SharedMemory),
           "gated_delta_rule_forward_sm90", stream);
  });
}

}  // namespace gdn::kernels::cuda::sm90
