// The SIMD kernels of the gated delta rule against the reference in fp64, at random shapes, under
// every instruction set. The bound is argued, not picked: our error against fp64 may be twice that
// of the plain loops computed in fp32, which round inputs and outputs to the same dtype.

#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <support/targets.h>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

#include <gdn/kernels/cpu/gated_delta_rule.h>
#include <gdn/kernels/reference/element.h>
#include <gdn/kernels/reference/gated_delta_rule.h>

namespace gdn::kernels {
namespace {

struct Case {
  int64_t B, T, H, HV, K, V, chunk_size;
  DType dtype;
  bool qk_l2norm, state_v_first, initial_state;
  std::vector<int64_t> cu_seqlens;  // empty: B sequences
  float gate = 0.3F;                // g is uniform in [-gate, 0]
};

std::ostream& operator<<(std::ostream& out, const Case& c) {
  out << "B " << c.B << " T " << c.T << " H/HV " << c.H << "/" << c.HV << " K " << c.K << " V "
      << c.V << " C " << c.chunk_size << " dtype " << static_cast<int>(c.dtype) << " l2norm "
      << c.qk_l2norm << " v_first " << c.state_v_first << " initial " << c.initial_state << " gate "
      << c.gate << " cu_seqlens";
  for (const int64_t end : c.cu_seqlens) out << " " << end;
  return out;
}

/// An array of any dtype, NaN until written.
struct Array {
  DType dtype;
  std::vector<double> storage;  // room for the widest dtype
  size_t size;

  Array(DType dtype, size_t size)
      : dtype(dtype), storage(size, std::numeric_limits<double>::quiet_NaN()), size(size) {
    for (size_t i = 0; i < size; ++i) set(i, std::numeric_limits<double>::quiet_NaN());
  }
  double get(size_t i) const {
    return reference::load_element<double>(storage.data(), dtype, static_cast<int64_t>(i));
  }
  void set(size_t i, double value) {
    reference::store_element<double>(storage.data(), dtype, static_cast<int64_t>(i), value);
  }
  void* data() { return storage.data(); }
};

Array random_array(std::mt19937& random, DType dtype, int64_t size, double scale) {
  std::normal_distribution<double> normal(0.0, scale);
  Array array(dtype, static_cast<size_t>(size));
  for (size_t i = 0; i < array.size; ++i) array.set(i, normal(random));
  return array;
}

Array uniform_array(std::mt19937& random, DType dtype, int64_t size, double low, double high) {
  std::uniform_real_distribution<double> uniform(low, high);
  Array array(dtype, static_cast<size_t>(size));
  for (size_t i = 0; i < array.size; ++i) array.set(i, uniform(random));
  return array;
}

Array converted(const Array& from, DType dtype) {
  Array to(dtype, from.size);
  for (size_t i = 0; i < from.size; ++i) to.set(i, from.get(i));
  return to;
}

enum class Implementation { reference_fp64, reference_fp32, simd_chunk, simd_recurrent };

/// Everything that a problem puts out.
struct Results {
  std::vector<std::pair<std::string, Array>> arrays;
};

/// Two threads and uneven ranges.
void two_threads(int64_t count, FunctionRef<void(int64_t begin, int64_t end)> body) {
  const int64_t cut = count / 3;
  std::thread other([&] { body(0, cut); });
  body(cut, count);
  other.join();
}

class Problem {
 public:
  Problem(const Case& c, uint32_t seed) : case_(c) {
    std::mt19937 random(seed);
    const double key_scale = c.qk_l2norm ? 1.0 : 1.0 / std::sqrt(static_cast<double>(c.K));
    N_ = c.cu_seqlens.empty() ? c.B : static_cast<int64_t>(c.cu_seqlens.size()) - 1;
    const int64_t keys = c.B * c.T * c.H * c.K, values = c.B * c.T * c.HV * c.V;
    const int64_t states = N_ * c.HV * c.K * c.V;
    inputs_ = {
        {random_array(random, c.dtype, keys, key_scale), false},
        {random_array(random, c.dtype, keys, key_scale), false},
        {random_array(random, c.dtype, values, 1.0), false},
        {uniform_array(random, DType::f32, c.B * c.T * c.HV, -c.gate, 0.0), true},
        {uniform_array(random, DType::f32, c.B * c.T * c.HV, 0.0, 2.0), true},
        {random_array(random, DType::f32, states, 0.5), true},
        {random_array(random, c.dtype, values, 1.0), false},
        {random_array(random, DType::f32, states, 1.0), true},
    };
  }

  Results run(Implementation implementation, ParallelFor parallel_for = two_threads) const {
    const Case& c = case_;
    const bool exact = implementation == Implementation::reference_fp64;
    const DType dtype = exact ? DType::f64 : c.dtype;
    const DType wide = exact ? DType::f64 : DType::f32;
    std::vector<Array> in;
    for (const Input& input : inputs_)
      in.push_back(converted(input.array, input.wide ? wide : dtype));
    const auto view = [&](Array& array, int64_t heads, int64_t width) {
      return MutableView4{array.data(), c.T * heads * width, heads * width, width};
    };
    const auto const_view = [&](Array& array, int64_t heads, int64_t width) {
      return ConstView4{array.data(), c.T * heads * width, heads * width, width};
    };
    GatedDeltaRuleForward forward;
    forward.B = c.B, forward.T = c.T, forward.H = c.H, forward.HV = c.HV;
    forward.K = c.K, forward.V = c.V, forward.N = N_, forward.chunk_size = c.chunk_size;
    forward.dtype = dtype, forward.qk_l2norm = c.qk_l2norm;
    forward.state_v_first = c.state_v_first;
    forward.scale = 0.5F;
    forward.cu_seqlens = c.cu_seqlens.empty() ? nullptr : c.cu_seqlens.data();
    forward.q = const_view(in[0], c.H, c.K), forward.k = const_view(in[1], c.H, c.K);
    forward.v = const_view(in[2], c.HV, c.V);
    forward.g = in[3].data(), forward.beta = in[4].data();
    if (c.initial_state) forward.initial_state = in[5].data();
    forward.parallel_for = parallel_for;

    Array o(dtype, in[2].size), final_state(wide, in[5].size);
    forward.o = view(o, c.HV, c.V);
    forward.final_state = final_state.data();
    std::vector<float> segment_states(
        static_cast<size_t>(segment_count(forward) * c.HV * c.K * c.V),
        std::numeric_limits<float>::quiet_NaN());
    if (implementation == Implementation::simd_chunk)
      forward.segment_states = segment_states.data();
    switch (implementation) {
      case Implementation::reference_fp64:
        reference::recurrent_gated_delta_rule<double>(forward);
        break;
      case Implementation::reference_fp32:
        reference::chunk_gated_delta_rule<float>(forward);
        break;
      case Implementation::simd_chunk:
        cpu::chunk_gated_delta_rule(forward);
        break;
      case Implementation::simd_recurrent:
        cpu::recurrent_gated_delta_rule(forward);
        break;
    }
    Results results;
    results.arrays.emplace_back("o", std::move(o));
    results.arrays.emplace_back("final_state", std::move(final_state));
    if (implementation == Implementation::simd_recurrent) return results;

    GatedDeltaRuleBackward backward;
    static_cast<GatedDeltaRuleProblem&>(backward) = forward;
    backward.segment_states = segment_states.data();
    Array d_q(dtype, in[0].size), d_k(dtype, in[1].size), d_v(dtype, in[2].size);
    Array d_g(wide, in[3].size), d_beta(wide, in[4].size), d_initial(wide, in[5].size);
    backward.d_o = const_view(in[6], c.HV, c.V);
    backward.d_final_state = in[7].data();
    backward.d_q = view(d_q, c.H, c.K), backward.d_k = view(d_k, c.H, c.K);
    backward.d_v = view(d_v, c.HV, c.V);
    backward.d_g = d_g.data(), backward.d_beta = d_beta.data();
    backward.d_initial_state = d_initial.data();
    switch (implementation) {
      case Implementation::reference_fp64:
        reference::recurrent_gated_delta_rule_backward<double>(backward);
        break;
      case Implementation::reference_fp32:
        reference::chunk_gated_delta_rule_backward<float>(backward);
        break;
      default:
        cpu::chunk_gated_delta_rule_backward(backward);
    }
    results.arrays.emplace_back("d_q", std::move(d_q));
    results.arrays.emplace_back("d_k", std::move(d_k));
    results.arrays.emplace_back("d_v", std::move(d_v));
    results.arrays.emplace_back("d_g", std::move(d_g));
    results.arrays.emplace_back("d_beta", std::move(d_beta));
    results.arrays.emplace_back("d_initial_state", std::move(d_initial));
    return results;
  }

 private:
  struct Input {
    Array array;
    bool wide;  // at least fp32 whatever the dtype of q, k and v
  };
  Case case_;
  int64_t N_;
  std::vector<Input> inputs_;  // q k v g beta initial_state d_o d_final_state
};

double norm(const Array& array) {
  double sum = 0;
  for (size_t i = 0; i < array.size; ++i) sum += array.get(i) * array.get(i);
  return std::sqrt(sum);
}

double error_norm(const Array& got, const Array& want) {
  double sum = 0;
  for (size_t i = 0; i < got.size; ++i) {
    const double difference = got.get(i) - want.get(i);
    sum += difference * difference;
  }
  return std::sqrt(sum);  // NaN if anything was not written
}

void expect_as_good_as_plain(const Results& got, const Results& plain, const Results& exact) {
  for (size_t i = 0; i < got.arrays.size(); ++i) {
    const auto& [name, array] = got.arrays[i];
    const double error = error_norm(array, exact.arrays[i].second);
    const double plain_error = error_norm(plain.arrays[i].second, exact.arrays[i].second);
    const double rounding = 0x1p-22 * norm(exact.arrays[i].second);
    EXPECT_LE(error, 2 * plain_error + rounding)
        << name << ": relative error " << error / norm(exact.arrays[i].second)
        << ", of plain fp32 loops " << plain_error / norm(exact.arrays[i].second);
  }
}

std::vector<Case> fixed_cases() {
  std::vector<Case> cases;
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
    for (const int64_t T : {1, 15, 64, 65}) {
      cases.push_back({2, T, 1, 2, 17, 9, 64, dtype, true, false, true, {}});
    }
    cases.push_back(
        {1, 90, 2, 4, 32, 48, 16, dtype, false, true, true, {0, 0, 33, 33, 34, 90, 90}});
  }
  // More than one segment, so that the backward replays from kept states.
  cases.push_back({1, 2 * kSegmentTokens + 70, 1, 2, 8, 16, 64, DType::f32, true, false, true, {}});
  cases.push_back({1, 1200, 1, 1, 8, 8, 128, DType::f32, true, false, false, {0, 1100, 1200}});
  cases.push_back({1, 130, 1, 1, 128, 128, 64, DType::f32, true, false, true, {}});
  cases.push_back({1, 70, 1, 1, 256, 40, 64, DType::bf16, true, true, true, {}});
  cases.push_back({1, 0, 1, 1, 8, 8, 64, DType::f32, true, false, true, {0, 0}});
  cases.push_back({1, 100, 1, 1, 16, 16, 64, DType::f32, true, false, true, {}, 0.0F});
  cases.push_back({1, 100, 1, 1, 16, 16, 64, DType::f32, true, false, true, {}, 60.0F});
  return cases;
}

std::vector<Case> random_cases(int count) {
  std::mt19937 random(7);
  const auto pick = [&](int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(random);
  };
  std::vector<Case> cases;
  for (int i = 0; i < count; ++i) {
    Case c{pick(1, 2),
           pick(1, 200),
           pick(1, 2),
           0,
           pick(1, 70),
           pick(1, 70),
           int64_t{16} << pick(0, 3),
           static_cast<DType>(pick(0, 2)),
           pick(0, 3) > 0,
           pick(0, 1) == 1,
           pick(0, 1) == 1,
           {}};
    c.HV = c.H * pick(1, 3);
    if (pick(0, 1) == 1) {
      c.B = 1;
      for (int64_t end = 0; end < c.T; end += pick(0, 60)) c.cu_seqlens.push_back(end);
      c.cu_seqlens.push_back(c.T);
    }
    cases.push_back(c);
  }
  return cases;
}

void compare(const Case& c, uint32_t seed) {
  SCOPED_TRACE(testing::Message() << c);
  const Problem problem(c, seed);
  const Results exact = problem.run(Implementation::reference_fp64);
  const Results plain = problem.run(Implementation::reference_fp32);
  test::for_each_target([&] {
    expect_as_good_as_plain(problem.run(Implementation::simd_chunk), plain, exact);
    expect_as_good_as_plain(problem.run(Implementation::simd_recurrent), plain, exact);
  });
}

TEST(GatedDeltaRuleSimd, AgreesWithTheReferenceAtChosenShapes) {
  uint32_t seed = 0;
  for (const Case& c : fixed_cases()) compare(c, ++seed);
}

TEST(GatedDeltaRuleSimd, AgreesWithTheReferenceAtRandomShapes) {
  uint32_t seed = 100;
  for (const Case& c : random_cases(60)) compare(c, ++seed);
}

TEST(GatedDeltaRuleSimd, TheSameBitsOnEveryRunAndForEveryPartition) {
  const Case c{2, 150, 2, 4, 24, 40, 64, DType::f32, true, false, true, {}};
  const Results first = Problem(c, 3).run(Implementation::simd_chunk, two_threads);
  const Results second = Problem(c, 3).run(Implementation::simd_chunk, serial_for);
  for (size_t i = 0; i < first.arrays.size(); ++i) {
    EXPECT_EQ(error_norm(first.arrays[i].second, second.arrays[i].second), 0.0)
        << first.arrays[i].first;
  }
}

}  // namespace
}  // namespace gdn::kernels
