// The element-wise kernels and sums over rows: checked against the fp64 reference at sizes that
// meet every path, then timed at sizes of training, beside the rate of a copy in the same run.
//
//   bench_elementwise [check | time | all] [part of the names of cases]
#include <gdn/kernels/cuda/cross_entropy.h>
#include <gdn/kernels/cuda/gate.h>
#include <gdn/kernels/cuda/norm.h>
#include <gdn/kernels/cuda/short_convolution.h>
#include <gdn/kernels/reference/cross_entropy.h>
#include <gdn/kernels/reference/gate.h>
#include <gdn/kernels/reference/norm.h>
#include <gdn/kernels/reference/short_convolution.h>

#include "case.cuh"

namespace {

using namespace gdn::benchmarks;

const char* name_of(DType dtype) {
  return dtype == DType::f32 ? "f32" : dtype == DType::bf16 ? "bf16" : "f16";
}
double size_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

struct NormShape {
  int64_t M, D;
  DType dtype = DType::bf16;
  bool gated = false, weighted = true;
  DType weight_dtype = DType::f32;
  int64_t skip = 0, pad = 0;  // elements before a tensor, and between rows
  bool in_place = false;      // backward: d_x is d_y
};

template <typename Problem>
Problem norm_problem(Memory& memory, const NormShape& s) {
  Problem p;
  p.M = s.M;
  p.D = s.D;
  p.kind = s.weighted ? NormKind::rms : NormKind::l2;
  p.eps = 1e-5;
  p.dtype = memory.dtype(s.dtype);
  p.weight_dtype = memory.dtype(s.weight_dtype);
  const int64_t stride = s.D + s.pad;
  p.x = {memory.input(s.dtype, s.M * stride, s.skip), stride};
  if (s.weighted) p.weight = memory.input(s.weight_dtype, s.D, s.skip);
  if (s.gated) p.gate = {memory.input(s.dtype, s.M * stride, s.skip), stride};
  return p;
}

std::string name_of(const NormShape& s, const char* pass) {
  return std::string(s.gated      ? "gated norm "
                     : s.weighted ? "rms_norm "
                                  : "l2_norm ") +
         pass + " " + std::to_string(s.M) + " x " + std::to_string(s.D) + " " + name_of(s.dtype) +
         (s.weighted ? std::string(", weight ") + name_of(s.weight_dtype) : "") +
         (s.in_place ? ", in place" : "") + (s.skip + s.pad > 0 ? ", unaligned" : "");
}

Case norm_case(const NormShape& s) {
  const double bytes = size_of(s.dtype) * static_cast<double>(s.M * s.D);
  return {name_of(s, "forward"), bytes * (s.gated ? 3 : 2), s.dtype,
          [s](Memory& memory, bool reference) -> std::function<void(cudaStream_t)> {
            auto p = norm_problem<NormForward>(memory, s);
            p.y = {memory.output(s.dtype, s.M * s.D), s.D};
            if (reference) return [p](cudaStream_t) { reference::norm<double>(p); };
            return [p](cudaStream_t stream) { cuda::norm(p, stream); };
          }};
}

Case norm_backward_case(const NormShape& s) {
  const double bytes = size_of(s.dtype) * static_cast<double>(s.M * s.D);
  return {name_of(s, "backward"), bytes * (s.gated ? 5 : 3), s.dtype,
          [s](Memory& memory, bool reference) -> std::function<void(cudaStream_t)> {
            auto p = norm_problem<NormBackward>(memory, s);
            const int64_t count = s.M * s.D;
            void* d_y = memory.input(s.dtype, count, s.skip);
            p.d_x = {memory.output(s.dtype, count, s.skip), s.D};
            if (s.gated) p.d_gate = {memory.output(s.dtype, count, s.skip), s.D};
            if (s.weighted) p.d_weight = memory.output(DType::f32, s.D);
            if (reference) {
              p.d_y = {d_y, s.D};
              return [p](cudaStream_t) { reference::norm_backward<double>(p); };
            }
            void* scratch = memory.scratch(cuda::norm_backward_scratch(p));
            p.d_y = s.in_place ? ConstView2{p.d_x.data, s.D} : ConstView2{d_y, s.D};
            const auto bytes = static_cast<size_t>(count * cuda::element_size(s.dtype));
            return [=](cudaStream_t stream) {
              if (s.in_place) {
                cudaMemcpyAsync(p.d_x.data, d_y, bytes, cudaMemcpyDeviceToDevice, stream);
              }
              cuda::norm_backward(p, scratch, stream);
            };
          }};
}

struct ConvolutionShape {
  int64_t B, T, D, W = 4;
  std::vector<int64_t> boundaries;  // none: a sequence a row
  DType dtype = DType::bf16;
  bool silu = true, bias = false, states = false;
  DType weight_dtype = DType::f32;
  int64_t skip = 0, pad = 0;
};

std::string name_of(const ConvolutionShape& s, const char* pass) {
  return std::string("convolution ") + pass + " " + std::to_string(s.B) + " x " +
         std::to_string(s.T) + " x " + std::to_string(s.D) + " W " + std::to_string(s.W) + " " +
         name_of(s.dtype) +
         (s.boundaries.empty() ? "" : ", packed " + std::to_string(s.boundaries.size() - 1)) +
         (s.states ? ", states" : "") + (s.skip + s.pad > 0 ? ", unaligned" : "");
}

template <typename Problem>
Problem convolution_problem(Memory& memory, const ConvolutionShape& s) {
  Problem p;
  p.B = s.B;
  p.T = s.T;
  p.D = s.D;
  p.W = s.W;
  p.N = s.boundaries.empty() ? s.B : static_cast<int64_t>(s.boundaries.size()) - 1;
  p.silu = s.silu;
  p.dtype = memory.dtype(s.dtype);
  p.weight_dtype = memory.dtype(s.weight_dtype);
  if (!s.boundaries.empty()) p.cu_seqlens = memory.integers(s.boundaries);
  const int64_t stride = s.D + s.pad;
  p.x = {memory.input(s.dtype, s.B * s.T * stride, s.skip), s.T * stride, stride};
  p.weight = memory.input(s.weight_dtype, s.D * s.W, s.skip);
  if (s.bias) p.bias = memory.input(s.weight_dtype, s.D);
  if (s.states) p.initial_state = memory.input(s.dtype, p.N * s.D * (s.W - 1));
  return p;
}

Case convolution_case(const ConvolutionShape& s) {
  const double bytes = size_of(s.dtype) * static_cast<double>(s.B * s.T * s.D);
  return {name_of(s, "forward"), 2 * bytes, s.dtype,
          [s](Memory& memory, bool reference) -> std::function<void(cudaStream_t)> {
            auto p = convolution_problem<ShortConvolutionForward>(memory, s);
            p.y = {memory.output(s.dtype, s.B * s.T * s.D, s.skip), s.T * s.D, s.D};
            if (s.states) p.final_state = memory.output(s.dtype, p.N * s.D * (s.W - 1));
            if (reference) return [p](cudaStream_t) { reference::short_convolution<double>(p); };
            return [p](cudaStream_t stream) { cuda::short_convolution(p, stream); };
          }};
}

Case convolution_backward_case(const ConvolutionShape& s) {
  const double bytes = size_of(s.dtype) * static_cast<double>(s.B * s.T * s.D);
  return {name_of(s, "backward"), 3 * bytes, s.dtype,
          [s](Memory& memory, bool reference) -> std::function<void(cudaStream_t)> {
            auto p = convolution_problem<ShortConvolutionBackward>(memory, s);
            p.d_y = {memory.input(s.dtype, s.B * s.T * s.D, s.skip), s.T * s.D, s.D};
            p.d_x = {memory.output(s.dtype, s.B * s.T * s.D, s.skip), s.T * s.D, s.D};
            p.d_weight = memory.output(DType::f32, s.D * s.W);
            if (s.bias) p.d_bias = memory.output(DType::f32, s.D);
            if (s.states) {
              p.d_final_state = memory.input(s.dtype, p.N * s.D * (s.W - 1));
              p.d_initial_state = memory.output(s.dtype, p.N * s.D * (s.W - 1));
            }
            if (reference) {
              return [p](cudaStream_t) { reference::short_convolution_backward<double>(p); };
            }
            void* scratch = memory.scratch(cuda::short_convolution_backward_scratch(p));
            return
                [=](cudaStream_t stream) { cuda::short_convolution_backward(p, scratch, stream); };
          }};
}

std::vector<Case> gate_cases(int64_t M, int64_t HV) {
  const auto problem = [=]<typename Problem>(Memory& memory, Problem p) {
    p.M = M;
    p.HV = HV;
    p.dtype = memory.dtype(DType::bf16);
    p.a = memory.input(DType::bf16, M * HV);
    p.A_log = memory.input(DType::f32, HV);
    p.dt_bias = memory.input(DType::f32, HV);
    return p;
  };
  const std::string shape = std::to_string(M) + " x " + std::to_string(HV);
  const double count = static_cast<double>(M * HV);
  return {{"gate forward " + shape, 6 * count, DType::f32,
           [=](Memory& memory, bool reference) -> std::function<void(cudaStream_t)> {
             auto p = problem(memory, GateForward());
             p.g = memory.output(DType::f32, M * HV);
             if (reference) return [p](cudaStream_t) { reference::gate<double>(p); };
             return [p](cudaStream_t stream) { cuda::gate(p, stream); };
           }},
          {"gate backward " + shape, 8 * count, DType::bf16,
           [=](Memory& memory, bool reference) -> std::function<void(cudaStream_t)> {
             auto p = problem(memory, GateBackward());
             p.d_g = memory.input(DType::f32, M * HV);
             p.d_a = memory.output(DType::bf16, M * HV);
             p.d_A_log = memory.output(DType::f32, HV);
             p.d_dt_bias = memory.output(DType::f32, HV);
             if (reference) return [p](cudaStream_t) { reference::gate_backward<double>(p); };
             void* scratch = memory.scratch(cuda::gate_backward_scratch(p));
             return [=](cudaStream_t stream) { cuda::gate_backward(p, scratch, stream); };
           }}};
}

Case cross_entropy_case(int64_t M, int64_t vocabulary, int64_t skip = 0) {
  return {"cross_entropy forward " + std::to_string(M) + " x " + std::to_string(vocabulary),
          2.0 * static_cast<double>(M * vocabulary), DType::f32,
          [=](Memory& memory, bool reference) -> std::function<void(cudaStream_t)> {
            CrossEntropyForward p;
            p.M = M;
            p.vocabulary = vocabulary;
            p.ignore_index = -100;
            p.dtype = memory.dtype(DType::bf16);
            p.logits = {memory.input(DType::bf16, M * vocabulary, skip), vocabulary};
            std::vector<int64_t> targets(M);
            for (int64_t m = 0; m < M; ++m) targets[m] = m % 7 == 3 ? -100 : m * 31 % vocabulary;
            p.target = memory.integers(targets);
            p.loss = memory.output(DType::f32, M);
            p.log_sum_exp = memory.output(DType::f32, M);
            if (reference) return [p](cudaStream_t) { reference::cross_entropy<double>(p); };
            return [p](cudaStream_t stream) { cuda::cross_entropy(p, stream); };
          }};
}

std::vector<Case> small_cases() {
  std::vector<Case> cases;
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
    for (const int64_t D : {1, 7, 64, 128, 130, 256, 512, 1024, 1032, 2048, 2050, 4096, 6152}) {
      for (const int kind : {0, 1, 2}) {
        NormShape s = {67, D, dtype, kind == 1, kind != 2};
        cases.push_back(norm_case(s));
        if (D == 1) continue;  // d_x is what cancellation leaves
        cases.push_back(norm_backward_case(s));
        s.in_place = true;
        s.weight_dtype = dtype;
        cases.push_back(norm_backward_case(s));
        s.in_place = false;
        s.skip = 3;
        s.pad = 5;
        cases.push_back(norm_case(s));
        cases.push_back(norm_backward_case(s));
      }
    }
    cases.push_back(norm_backward_case({30011, 16, dtype, true}));
    cases.push_back(norm_backward_case({9001, 512, dtype, true}));
    for (const int64_t W : {2, 3, 4, 5, 8}) {
      for (const int64_t T : {1, 2, 31, 32, 33, 128, 150, 300}) {
        ConvolutionShape s = {2, T, W == 3 ? 7 : 24, W, {}, dtype, T % 2 == 0, true, true};
        cases.push_back(convolution_case(s));
        cases.push_back(convolution_backward_case(s));
        s.D = T == 150 ? 1040 : 200;
        s.bias = s.states = false;
        s.weight_dtype = dtype;
        cases.push_back(convolution_case(s));
        cases.push_back(convolution_backward_case(s));
        for (const int64_t skip : {4, 3}) {
          s.skip = s.pad = skip;
          cases.push_back(convolution_case(s));
          cases.push_back(convolution_backward_case(s));
        }
      }
      ConvolutionShape s = {1, 300, 24, W, {0, 1, 1, 3, 40, 170, 170, 171, 300}, dtype};
      cases.push_back(convolution_case(s));
      cases.push_back(convolution_backward_case(s));
      s.states = s.bias = true;
      cases.push_back(convolution_case(s));
      cases.push_back(convolution_backward_case(s));
    }
  }
  for (const int64_t HV : {1, 4, 6, 32, 48, 100}) {
    for (const int64_t M : {1, 66, 1000, 40000}) {
      for (const Case& c : gate_cases(M, HV)) cases.push_back(c);
    }
  }
  for (const int64_t vocabulary : {1, 3, 1000, 5003, 32000, 70000}) {
    cases.push_back(cross_entropy_case(40, vocabulary));
    cases.push_back(cross_entropy_case(40, vocabulary, 3));
  }
  return cases;
}

std::vector<Case> large_cases() {
  constexpr int64_t kTokens = 32768;
  std::vector<int64_t> boundaries;
  for (int64_t n = 0; n <= 16; ++n) boundaries.push_back(n * kTokens / 16 + (n % 16 ? n % 5 : 0));
  std::vector<Case> cases;
  for (const int64_t D : {1536, 3072}) {
    const ConvolutionShape rows = {16, kTokens / 16, D};
    ConvolutionShape packed = {1, kTokens, D};
    packed.boundaries = boundaries;
    for (const ConvolutionShape& s : {rows, packed}) {
      cases.push_back(convolution_case(s));
      cases.push_back(convolution_backward_case(s));
    }
  }
  ConvolutionShape decoding = {64, 1, 8192};
  decoding.states = true;
  cases.push_back(convolution_case(decoding));
  for (const DType weight : {DType::f32, DType::bf16}) {
    const NormShape s = {kTokens, 2048, DType::bf16, false, true, weight};
    cases.push_back(norm_case(s));
    cases.push_back(norm_backward_case(s));
  }
  for (const int64_t D : {512, 128}) {
    cases.push_back(norm_case({6 * kTokens, D, DType::bf16, true}));
    cases.push_back(norm_backward_case({6 * kTokens, D, DType::bf16, true}));
  }
  for (const int64_t D : {256, 128}) {
    cases.push_back(norm_case({6 * kTokens, D, DType::bf16, false, false}));
    cases.push_back(norm_backward_case({6 * kTokens, D, DType::bf16, false, false}));
  }
  for (const int64_t HV : {6, 32}) {
    for (const Case& c : gate_cases(kTokens, HV)) cases.push_back(c);
  }
  cases.push_back(cross_entropy_case(8192, 32000));
  return cases;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string what = argc > 1 ? argv[1] : "all", part = argc > 2 ? argv[2] : "";
  const auto wanted = [&](const Case& c) { return c.name.find(part) != std::string::npos; };
  cudaDeviceProp device;
  check(cudaGetDeviceProperties(&device, 0), "device");
  if (what != "time") {
    int count = 0;
    for (const Case& c : small_cases()) {
      if (!wanted(c)) continue;
      check_case(c);
      ++count;
    }
    std::printf("%d of %d checks wrong\n", failures, count);
  }
  if (what != "check") {
    const double rate = copy_rate();
    std::printf("%s, copy %.2f TB/s\n", device.name, 1e-12 * rate);
    for (const Case& c : large_cases()) {
      if (wanted(c)) time_case(c, rate);
    }
  }
  return failures == 0 ? 0 : 1;
}
