// What the kernels for compute capability 9.0 can serve: host functions, compiled without CUDA too.
#include <cstdint>

#include <gdn/kernels/cuda/gated_delta_rule.h>

namespace gdn::kernels::cuda {
namespace {

constexpr int64_t kKeys = 128, kWideKeys = 256;

/// The copy engine moves whole pieces of 16 bytes.
template <typename Void>
bool aligned(const View4<Void>& view) {
  return reinterpret_cast<uintptr_t>(view.data) % 16 == 0 && view.stride_b % 8 == 0 &&
         view.stride_t % 8 == 0 && view.stride_h % 8 == 0;
}

std::string why_not(const GatedDeltaRuleProblem& p, int64_t most_keys) {
  if (p.dtype != DType::bf16 && p.dtype != DType::f16) return "q, k, v are not bf16 or fp16";
  if (p.K < 8 || p.K > most_keys || p.K % 8 != 0) {
    return "K = " + std::to_string(p.K) + ", not a multiple of 8 up to " +
           std::to_string(most_keys);
  }
  if (p.V < 8 || p.V % 8 != 0) return "V = " + std::to_string(p.V) + ", not a multiple of 8";
  if (p.chunk_size != 64) return "chunk_size = " + std::to_string(p.chunk_size) + ", not 64";
  if (p.qk_l2norm) return "q and k must be normalised beforehand";
  if (p.B * p.T > INT32_MAX) return "B * T is beyond 2^31";
  if (!aligned(p.q) || !aligned(p.k) || !aligned(p.v)) {
    return "q, k, v and their strides are not multiples of 16 bytes";
  }
  return {};
}

std::string why_not(const GatedDeltaRuleForward& p, int64_t most_keys) {
  const GatedDeltaRuleProblem& problem = p;
  if (std::string reason = why_not(problem, most_keys); !reason.empty()) return reason;
  if (p.o.data == nullptr) return "only the states are wanted";
  if (!aligned(p.o)) return "o and its strides are not multiples of 16 bytes";
  return {};
}

std::string why_not(const GatedDeltaRuleBackward& p, int64_t most_keys) {
  const GatedDeltaRuleProblem& problem = p;
  if (std::string reason = why_not(problem, most_keys); !reason.empty()) return reason;
  if (p.segment_states == nullptr) return "segment_states are required";
  if (!aligned(p.d_o) || !aligned(p.d_q) || !aligned(p.d_k) || !aligned(p.d_v)) {
    return "d_o, d_q, d_k, d_v and their strides are not multiples of 16 bytes";
  }
  return {};
}

}  // namespace

std::string why_not_sm90(const GatedDeltaRuleForward& p) { return why_not(p, kKeys); }

std::string why_not_sm90_wide(const GatedDeltaRuleForward& p) { return why_not(p, kWideKeys); }

std::string why_not_sm90(const GatedDeltaRuleBackward& p) {
  if (p.K != kKeys || p.V != kKeys) {
    return "K = " + std::to_string(p.K) + ", V = " + std::to_string(p.V) + ", not 128";
  }
  return why_not(p, kKeys);
}

std::string why_not_sm90_wide(const GatedDeltaRuleBackward& p) { return why_not(p, kWideKeys); }

}  // namespace gdn::kernels::cuda
