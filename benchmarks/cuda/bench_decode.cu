// The recurrent step of decoding, in place on the state: checked against the fp64 reference, then
// timed beside the rate of a copy in the same run.
#include <string>
#include <vector>

#include <gdn/kernels/cuda/gated_delta_rule_recurrent.h>
#include <gdn/kernels/reference/gated_delta_rule.h>

#include "case.cuh"

namespace {

using namespace gdn::benchmarks;

struct DecodeShape {
  int64_t B, H, HV, K, V;
  bool state_v_first = false, in_place = true;
};

/// One token of every batch row, bf16; the L2 norm of q and k inside.
template <typename Problem>
Problem decode_problem(Memory& memory, const DecodeShape& s) {
  Problem p;
  p.B = p.N = s.B;
  p.T = 1;
  p.H = s.H;
  p.HV = s.HV;
  p.K = s.K;
  p.V = s.V;
  p.dtype = memory.dtype(DType::bf16);
  p.scale = 1 / std::sqrt(static_cast<double>(s.K));
  p.qk_l2norm = true;
  p.state_v_first = s.state_v_first;
  p.q = {memory.input(DType::bf16, s.B * s.H * s.K), s.H * s.K, s.H * s.K, s.K};
  p.k = {memory.input(DType::bf16, s.B * s.H * s.K), s.H * s.K, s.H * s.K, s.K};
  p.v = {memory.input(DType::bf16, s.B * s.HV * s.V), s.HV * s.V, s.HV * s.V, s.V};
  p.g = memory.input(DType::f32, s.B * s.HV);
  p.beta = memory.input(DType::f32, s.B * s.HV);
  const int64_t state = s.B * s.HV * s.K * s.V;
  void* initial_state = memory.input(DType::f32, state);
  p.initial_state = initial_state;
  p.o = {memory.output(DType::bf16, s.B * s.HV * s.V), s.HV * s.V, s.HV * s.V, s.V};
  p.final_state = s.in_place ? initial_state : memory.output(DType::f32, state);
  return p;
}

Case decode_case(const DecodeShape& s) {
  const std::string name =
      "batch " + std::to_string(s.B) + ", H/HV " + std::to_string(s.H) + "/" +
      std::to_string(s.HV) + ", K/V " + std::to_string(s.K) + "/" + std::to_string(s.V) +
      (s.state_v_first ? ", [V, K]" : ", [K, V]");
  const int64_t elements = 2 * s.B * (s.H * s.K + s.HV * s.V);  // of q, k, v, o
  return {name, 2.0 * static_cast<double>(elements + 4 * s.B * s.HV * s.K * s.V), DType::bf16,
          [s](Memory& memory, bool reference) -> std::function<void(cudaStream_t)> {
            if (reference) {
              const auto p = decode_problem<GatedDeltaRuleForward>(memory, s);
              return [p](cudaStream_t) { reference::recurrent_gated_delta_rule<double>(p); };
            }
            const auto p = decode_problem<cuda::RecurrentGatedDeltaRule>(memory, s);
            return [p](cudaStream_t stream) { cuda::recurrent_gated_delta_rule(p, stream); };
          }};
}

}  // namespace

int main() {
  for (const bool v_first : {false, true}) {
    for (const int64_t B : {1, 5}) {
      check_case(decode_case({B, 2, 4, 128, 128, v_first, false}));
      check_case(decode_case({B, 1, 2, 256, 512, v_first, false}));
      check_case(decode_case({B, 1, 1, 96, 64, v_first, false}));
    }
  }
  cudaDeviceProp device;
  check(cudaGetDeviceProperties(&device, 0), "device");
  const double rate = copy_rate();
  std::printf("%s, copy %.2f TB/s\n", device.name, 1e-12 * rate);
  for (const bool v_first : {false, true}) {
    for (const int64_t B : {1, 8, 64, 256, 1024}) {
      time_case(decode_case({B, 16, 32, 128, 128, v_first}), rate);
    }
    time_case(decode_case({64, 6, 6, 256, 512, v_first}), rate);
  }
  return failures == 0 ? 0 : 1;
}
