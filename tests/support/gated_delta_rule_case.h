// Random problems of the gated delta rule for kernels without torch: typed, strided, with poisoned
// outputs, and all results as plain numbers.
#pragma once

#include <array>
#include <cmath>
#include <cstddef>
#include <limits>
#include <map>
#include <random>
#include <string>
#include <support/compare.h>
#include <vector>

#include <gdn/kernels/gated_delta_rule.h>
#include <gdn/kernels/reference/element.h>

namespace gdn::test {

using Values = std::vector<double>;
using ForwardKernel = void (*)(const kernels::GatedDeltaRuleForward&);
using BackwardKernel = void (*)(const kernels::GatedDeltaRuleBackward&);

struct GatedDeltaRuleCase {
  int64_t B = 1, T = 1, H = 1, HV = 1, K = 4, V = 4;
  std::vector<int64_t> cu_seqlens = {};  // empty: B sequences
  int64_t chunk_size = 16;
  kernels::DType dtype = kernels::DType::f64;
  bool qk_l2norm = false;
  bool state_v_first = false;
  bool states = true;   // an initial state, and a gradient of the final one
  double min_g = -0.5;  // g is uniform in [min_g, 0]
  double max_beta = 1;
  uint64_t seed = 0;

  int64_t sequences() const {
    return cu_seqlens.empty() ? B : static_cast<int64_t>(cu_seqlens.size()) - 1;
  }
};

inline std::ostream& operator<<(std::ostream& out, const GatedDeltaRuleCase& c) {
  out << "B=" << c.B << " T=" << c.T << " H=" << c.H << " HV=" << c.HV << " K=" << c.K
      << " V=" << c.V << " C=" << c.chunk_size << " dtype=" << static_cast<int>(c.dtype)
      << " l2norm=" << c.qk_l2norm << " v_first=" << c.state_v_first << " states=" << c.states
      << " min_g=" << c.min_g << " max_beta=" << c.max_beta << " cu_seqlens=[";
  for (const int64_t boundary : c.cu_seqlens) out << boundary << " ";
  return out << "] seed=" << c.seed;
}

/// An array of one dtype.
class Array {
 public:
  Array(kernels::DType dtype, size_t size) : dtype_(dtype), size_(size), bytes_(size * 8) {}

  size_t size() const { return size_; }
  void* data() { return bytes_.data(); }
  double get(size_t i) const {
    return kernels::reference::load_element<double>(bytes_.data(), dtype_, static_cast<int64_t>(i));
  }
  void set(size_t i, double value) {
    kernels::reference::store_element(bytes_.data(), dtype_, static_cast<int64_t>(i), value);
  }
  void fill(double value) {
    for (size_t i = 0; i < size_; ++i) set(i, value);
  }
  Values values() const {
    Values result(size_);
    for (size_t i = 0; i < size_; ++i) result[i] = get(i);
    return result;
  }

 private:
  kernels::DType dtype_;
  size_t size_;
  std::vector<std::byte> bytes_;
};

/// A [B, T, heads, width] tensor with gaps between heads, tokens and rows. The gaps hold NaN: to
/// read one shows in the results, to write one is an error.
class StridedTensor {
 public:
  StridedTensor(kernels::DType dtype, int64_t B, int64_t T, int64_t heads, int64_t width)
      : sizes_{B, T, heads, width},
        stride_h_(width + 1),
        stride_t_(heads * stride_h_ + 2),
        stride_b_(T * stride_t_ + 3),
        array_(dtype, static_cast<size_t>(B * stride_b_)) {
    array_.fill(std::numeric_limits<double>::quiet_NaN());
  }
  StridedTensor(kernels::DType dtype, int64_t B, int64_t T, int64_t heads, int64_t width,
                const Values& values)
      : StridedTensor(dtype, B, T, heads, width) {
    size_t next = 0;
    for_each([&](size_t i) { array_.set(i, values[next++]); });
  }

  template <typename Void>
  kernels::View4<Void> view() {
    return {array_.data(), stride_b_, stride_t_, stride_h_};
  }

  Values values() const {
    Values result;
    for_each([&](size_t i) { result.push_back(array_.get(i)); });
    size_t poisoned = 0;
    for (const double value : array_.values()) poisoned += std::isnan(value) ? 1 : 0;
    const auto gaps = array_.size() - result.size();
    EXPECT_GE(poisoned, gaps) << "elements between the rows of a view were written";
    return result;
  }

 private:
  template <typename Body>
  void for_each(const Body& body) const {
    for (int64_t b = 0; b < sizes_[0]; ++b) {
      for (int64_t t = 0; t < sizes_[1]; ++t) {
        for (int64_t h = 0; h < sizes_[2]; ++h) {
          const int64_t row = b * stride_b_ + t * stride_t_ + h * stride_h_;
          for (int64_t i = 0; i < sizes_[3]; ++i) body(static_cast<size_t>(row + i));
        }
      }
    }
  }

  std::array<int64_t, 4> sizes_;
  int64_t stride_h_, stride_t_, stride_b_;
  Array array_;
};

/// Contiguous row-major values of every input, representable in the case's dtypes.
struct GatedDeltaRuleInputs {
  Values q, k, v, g, beta, initial_state, d_o, d_final_state;
};

inline GatedDeltaRuleInputs random_inputs(const GatedDeltaRuleCase& c) {
  std::mt19937_64 engine(c.seed);
  const auto gates = c.dtype == kernels::DType::f64 ? kernels::DType::f64 : kernels::DType::f32;
  const auto draw = [&](int64_t count, kernels::DType dtype, auto distribution) {
    Array array(dtype, static_cast<size_t>(count));
    for (size_t i = 0; i < array.size(); ++i) array.set(i, distribution(engine));
    return array.values();
  };
  // Keys of about unit length, as a layer's are: longer ones make the recurrence unstable.
  const std::normal_distribution<double> normal;
  const std::normal_distribution<double> key(0, 1 / std::sqrt(static_cast<double>(c.K)));
  const std::uniform_real_distribution<double> gate(c.min_g, 0);
  const std::uniform_real_distribution<double> strength(0, c.max_beta);
  const int64_t tokens = c.B * c.T;
  const int64_t states = c.sequences() * c.HV * c.K * c.V;
  GatedDeltaRuleInputs inputs;
  inputs.q = draw(tokens * c.H * c.K, c.dtype, normal);
  inputs.k = draw(tokens * c.H * c.K, c.dtype, key);
  inputs.v = draw(tokens * c.HV * c.V, c.dtype, normal);
  inputs.g = draw(tokens * c.HV, gates, gate);
  inputs.beta = draw(tokens * c.HV, gates, strength);
  inputs.d_o = draw(tokens * c.HV * c.V, c.dtype, normal);
  if (c.states) {
    inputs.initial_state = draw(states, gates, normal);
    inputs.d_final_state = draw(states, gates, normal);
  }
  return inputs;
}

/// The outputs of a forward and of its backward by name.
using Results = std::map<std::string, Values>;

/// The arrays that a problem points to.
class GatedDeltaRuleRunner {
 public:
  GatedDeltaRuleRunner(const GatedDeltaRuleCase& c, const GatedDeltaRuleInputs& inputs)
      : c_(c),
        gates_(c.dtype == kernels::DType::f64 ? kernels::DType::f64 : kernels::DType::f32),
        q_(c.dtype, c.B, c.T, c.H, c.K, inputs.q),
        k_(c.dtype, c.B, c.T, c.H, c.K, inputs.k),
        v_(c.dtype, c.B, c.T, c.HV, c.V, inputs.v),
        d_o_(c.dtype, c.B, c.T, c.HV, c.V, inputs.d_o),
        g_(array(inputs.g)),
        beta_(array(inputs.beta)),
        initial_state_(array(inputs.initial_state)),
        d_final_state_(array(inputs.d_final_state)) {}

  /// Runs the forward and, where given, the backward.
  Results run(ForwardKernel forward, BackwardKernel backward,
              kernels::ParallelFor parallel_for = kernels::serial_for) {
    Results results;
    kernels::GatedDeltaRuleForward f;
    describe(f, parallel_for);
    StridedTensor o(c_.dtype, c_.B, c_.T, c_.HV, c_.V);
    Array final_state = poisoned(gates_, state_size() * c_.sequences());
    Array segments = poisoned(kernels::DType::f32, state_size() * kernels::segment_count(f));
    f.o = o.view<void>();
    f.final_state = final_state.data();
    f.segment_states = backward == nullptr ? nullptr : static_cast<float*>(segments.data());
    forward(f);
    results["o"] = o.values();
    results["final_state"] = final_state.values();
    if (backward == nullptr) return results;
    results["segment_states"] = segments.values();

    kernels::GatedDeltaRuleBackward b;
    describe(b, parallel_for);
    StridedTensor d_q(c_.dtype, c_.B, c_.T, c_.H, c_.K);
    StridedTensor d_k(c_.dtype, c_.B, c_.T, c_.H, c_.K);
    StridedTensor d_v(c_.dtype, c_.B, c_.T, c_.HV, c_.V);
    Array d_g = poisoned(gates_, c_.B * c_.T * c_.HV);
    Array d_beta = poisoned(gates_, c_.B * c_.T * c_.HV);
    Array d_initial_state = poisoned(gates_, initial_state_.size());
    b.segment_states = f.segment_states;
    b.d_o = d_o_.view<const void>();
    b.d_q = d_q.view<void>();
    b.d_k = d_k.view<void>();
    b.d_v = d_v.view<void>();
    b.d_g = d_g.data();
    b.d_beta = d_beta.data();
    if (c_.states) {
      b.d_final_state = d_final_state_.data();
      b.d_initial_state = d_initial_state.data();
    }
    backward(b);
    results["d_q"] = d_q.values();
    results["d_k"] = d_k.values();
    results["d_v"] = d_v.values();
    results["d_g"] = d_g.values();
    results["d_beta"] = d_beta.values();
    results["d_initial_state"] = d_initial_state.values();
    return results;
  }

  /// Runs the forward with the final state in the memory of the initial one.
  Results run_in_place(ForwardKernel forward) {
    kernels::GatedDeltaRuleForward f;
    describe(f, kernels::serial_for);
    StridedTensor o(c_.dtype, c_.B, c_.T, c_.HV, c_.V);
    f.o = o.view<void>();
    f.final_state = initial_state_.data();
    forward(f);
    return {{"o", o.values()}, {"final_state", initial_state_.values()}};
  }

 private:
  int64_t state_size() const { return c_.HV * c_.K * c_.V; }

  Array array(const Values& values) const {
    Array result(gates_, values.size());
    for (size_t i = 0; i < values.size(); ++i) result.set(i, values[i]);
    return result;
  }

  static Array poisoned(kernels::DType dtype, int64_t size) {
    Array result(dtype, static_cast<size_t>(size));
    result.fill(std::numeric_limits<double>::quiet_NaN());
    return result;
  }

  void describe(kernels::GatedDeltaRuleProblem& p, kernels::ParallelFor parallel_for) {
    p.B = c_.B;
    p.T = c_.T;
    p.H = c_.H;
    p.HV = c_.HV;
    p.K = c_.K;
    p.V = c_.V;
    p.N = c_.sequences();
    p.chunk_size = c_.chunk_size;
    p.dtype = c_.dtype;
    p.scale = 0.7;
    p.qk_l2norm = c_.qk_l2norm;
    p.state_v_first = c_.state_v_first;
    p.cu_seqlens = c_.cu_seqlens.empty() ? nullptr : c_.cu_seqlens.data();
    p.q = q_.view<const void>();
    p.k = k_.view<const void>();
    p.v = v_.view<const void>();
    p.g = g_.data();
    p.beta = beta_.data();
    p.initial_state = c_.states ? initial_state_.data() : nullptr;
    p.parallel_for = parallel_for;
  }

  GatedDeltaRuleCase c_;
  kernels::DType gates_;
  StridedTensor q_, k_, v_, d_o_;
  Array g_, beta_, initial_state_, d_final_state_;
};

inline Results run(const GatedDeltaRuleCase& c, const GatedDeltaRuleInputs& inputs,
                   ForwardKernel forward, BackwardKernel backward,
                   kernels::ParallelFor parallel_for = kernels::serial_for) {
  return GatedDeltaRuleRunner(c, inputs).run(forward, backward, parallel_for);
}

/// Every result within `relative` times the largest magnitude of the expected one.
inline void expect_close(const Results& got, const Results& want, double relative) {
  ASSERT_EQ(got.size(), want.size());
  for (const auto& [name, values] : want) {
    double largest = 0;
    for (const double value : values) largest = std::max(largest, std::fabs(value));
    expect_close(got.at(name), values, relative * largest, name);
  }
}

}  // namespace gdn::test
