// Checks and shapes shared by all core operators.
#include <array>
#include <sstream>
#include <string>

#include <gdn/kernels/gated_delta_rule.h>
#include <gdn/ops/gated_delta_rule/core.h>
#include <gdn/ops/utils/check.h>
#include <gdn/ops/utils/cu_seqlens.h>
#include <gdn/ops/utils/views.h>

namespace gdn {
namespace {

template <typename Value>
std::string text(const Value& value) {
  std::ostringstream stream;
  stream << value;
  return stream.str();
}

void check_dtype(std::string_view op, std::string_view argument, const at::Tensor& tensor,
                 at::ScalarType dtype, std::string_view why) {
  if (tensor.scalar_type() != dtype) {
    reject(op, argument, std::string(c10::toString(dtype)) + std::string(why), describe(tensor));
  }
}

void check_device(std::string_view op, std::string_view argument, const at::Tensor& tensor,
                  const at::Device& device) {
  if (tensor.device() != device) {
    reject(op, argument, "on " + device.str() + " like q", describe(tensor));
  }
}

void check_state_dtype(std::string_view op, const CoreArguments& a) {
  const at::ScalarType wide = statistics_dtype(a.q.scalar_type());
  const bool may_be_bf16 = a.may_round_state && wide == at::kFloat && !a.q.is_cuda();
  if (may_be_bf16 && a.initial_state->scalar_type() == at::kBFloat16) return;
  check_dtype(op, a.state_name, *a.initial_state, wide,
              may_be_bf16 ? " or BFloat16" : " (states are never stored in less)");
}

}  // namespace

void check_arguments(std::string_view op, const CoreArguments& a) {
  check_shape(op, "q", a.q, {-1, -1, -1, -1}, "[B, T, H, K]");
  const c10::SymInt B = a.q.sym_size(0), T = a.q.sym_size(1), H = a.q.sym_size(2);
  const c10::SymInt K = a.q.sym_size(3);
  check_shape(op, "k", a.k, {B, T, H, K}, "[B, T, H, K]");
  check_shape(op, "v", a.v, {B, T, -1, -1}, "[B, T, HV, V]");
  const c10::SymInt HV = a.v.sym_size(2);
  if (H < 1 || K < 1) reject(op, "q", "of at least one head and one element", describe(a.q));
  if (HV < 1 || a.v.sym_size(3) < 1) {
    reject(op, "v", "of at least one head and one element", describe(a.v));
  }
  if (HV % H != 0) {
    reject(op, "v", "of a number of heads HV that is a multiple of q's H = " + text(H),
           "HV = " + text(HV));
  }
  check_shape(op, "g", a.g, {B, T, HV}, "[B, T, HV]");
  check_shape(op, "beta", a.beta, {B, T, HV}, "[B, T, HV]");

  check_floating(op, "q", a.q);
  check_dtype(op, "k", a.k, a.q.scalar_type(), " like q");
  check_dtype(op, "v", a.v, a.q.scalar_type(), " like q");
  check_floating(op, "g", a.g);
  check_floating(op, "beta", a.beta);
  check_device(op, "k", a.k, a.q.device());
  check_device(op, "v", a.v, a.q.device());
  check_device(op, "g", a.g, a.q.device());
  check_device(op, "beta", a.beta, a.q.device());

  constexpr std::array<int64_t, 4> kChunkSizes = {16, 32, 64, 128};
  if (std::find(kChunkSizes.begin(), kChunkSizes.end(), a.chunk_size) == kChunkSizes.end()) {
    reject(op, "chunk_size", "16, 32, 64 or 128", std::to_string(a.chunk_size));
  }
  if (a.cu_seqlens) {
    check_cu_seqlens_shape(op, *a.cu_seqlens, B);
    if (!a.cu_seqlens->is_cpu()) check_device(op, "cu_seqlens", *a.cu_seqlens, a.q.device());
  }
  if (a.initial_state) {
    check_shape(op, a.state_name, *a.initial_state, state_sizes(a), state_dimensions(a));
    check_state_dtype(op, a);
    check_device(op, a.state_name, *a.initial_state, a.q.device());
  }
}

c10::SymInt sequence_count(const CoreArguments& a) {
  return a.cu_seqlens ? a.cu_seqlens->sym_size(0) - 1 : a.q.sym_size(0);
}

c10::SymDimVector state_sizes(const CoreArguments& a) {
  const c10::SymInt K = a.q.sym_size(3);
  const c10::SymInt V = a.v.sym_size(3);
  if (a.state_v_first) return {sequence_count(a), a.v.sym_size(2), V, K};
  return {sequence_count(a), a.v.sym_size(2), K, V};
}

c10::SymInt segment_capacity(const CoreArguments& a) {
  constexpr int64_t kTokens = kernels::kSegmentTokens;
  const c10::SymInt T = a.q.sym_size(1);
  const c10::SymInt N = sequence_count(a);
  if (a.cu_seqlens) return (T + N * (kTokens - 1)) / kTokens;
  return N * ((T + (kTokens - 1)) / kTokens);
}

}  // namespace gdn
