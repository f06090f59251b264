// What the tests of the kernels ask of every kernel: gradients, all instruction sets, any threads.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <random>
#include <string>
#include <support/compare.h>
#include <support/numerical_gradient.h>
#include <support/targets.h>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

#include <gdn/kernels/reference/element.h>
#include <gdn/kernels/types.h>

namespace gdn::test {

using kernels::DType;
using kernels::ParallelFor;

inline int64_t bytes_of(DType dtype) {
  return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
}

/// Half a unit in the last place, relative to the number that is rounded.
inline double half_ulp(DType dtype) {
  return std::ldexp(1.0, dtype == DType::f64    ? -53
                         : dtype == DType::f32  ? -24
                         : dtype == DType::bf16 ? -8
                                                : -11);
}

/// Numbers of some dtype in exactly as much memory as they take; NaN until written.
class Buffer {
 public:
  Buffer(DType dtype, int64_t count)
      : dtype_(dtype), bytes_(static_cast<size_t>(count * bytes_of(dtype))) {
    for (int64_t i = 0; i < count; ++i) set(i, std::numeric_limits<double>::quiet_NaN());
  }

  /// Normally distributed rows of `columns` numbers; what lies between rows stays NaN.
  static Buffer random(DType dtype, int64_t rows, int64_t columns, int64_t stride, unsigned seed) {
    Buffer buffer(dtype, rows * stride);
    std::mt19937 generator(seed);
    std::normal_distribution<double> normal;
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < columns; ++j) buffer.set(i * stride + j, normal(generator));
    }
    return buffer;
  }
  static Buffer random(DType dtype, int64_t count, unsigned seed) {
    return random(dtype, 1, count, count, seed);
  }

  DType dtype() const { return dtype_; }
  int64_t size() const { return static_cast<int64_t>(bytes_.size()) / bytes_of(dtype_); }
  void* data() { return bytes_.data(); }
  const void* data() const { return bytes_.data(); }
  double operator[](int64_t i) const {
    return kernels::reference::load_element<double>(data(), dtype_, i);
  }
  void set(int64_t i, double value) { kernels::reference::store_element(data(), dtype_, i, value); }

  std::vector<double> values() const {
    std::vector<double> values(static_cast<size_t>(size()));
    for (int64_t i = 0; i < size(); ++i) values[i] = (*this)[i];
    return values;
  }
  Buffer as(DType dtype) const {
    Buffer copy(dtype, size());
    for (int64_t i = 0; i < size(); ++i) copy.set(i, (*this)[i]);
    return copy;
  }
  bool same_bytes(const Buffer& other) const { return bytes_ == other.bytes_; }

 private:
  DType dtype_;
  std::vector<std::byte> bytes_;
};

using Buffers = std::vector<Buffer>;

/// Hands out ranges of one, from the last to the first, to two threads in turn.
inline void backwards_on_two_threads(int64_t count,
                                     kernels::FunctionRef<void(int64_t, int64_t)> body) {
  const auto every_second = [&](int64_t last) {
    for (int64_t i = last; i >= 0; i -= 2) body(i, i + 1);
  };
  std::thread other([&] { every_second(count - 2); });
  every_second(count - 1);
  other.join();
}

// A Kernel below has
//   Buffers inputs(DType) const;                                       some inputs of that dtype
//   Buffers forward(const Buffers& inputs, Implementation, ParallelFor) const;
//   Buffers backward(const Buffers& inputs, const Buffers& d_outputs, Implementation,
//                    ParallelFor) const;     one gradient an input, of its size
//   double roundings() const;                bound on fp32 roundings, see expect_simd_matches
enum class Implementation { reference, simd };

/// y of a kernel that maps M rows of D elements, stride() apart, to as many; `run` computes it.
template <typename Forward, typename Kernel>
Buffers forward_rows(const Kernel& kernel, const Buffers& inputs, ParallelFor parallel_for,
                     void (*run)(const Forward&)) {
  Buffers outputs = {Buffer(inputs[0].dtype(), kernel.M * kernel.stride())};
  Forward p;
  kernel.fill(p, inputs, parallel_for);
  p.y = {outputs[0].data(), kernel.stride()};
  run(p);
  return outputs;
}

inline Buffers random_gradients(const Buffers& outputs) {
  Buffers gradients;
  for (const Buffer& output : outputs) {
    gradients.push_back(Buffer::random(output.dtype(), output.size(), 99));
  }
  return gradients;
}

inline Buffers as_double(const Buffers& buffers) {
  Buffers doubles;
  for (const Buffer& buffer : buffers) doubles.push_back(buffer.as(DType::f64));
  return doubles;
}

/// The reference's gradients in fp64 against central differences of its forward.
template <typename Kernel>
void expect_reference_gradients(const Kernel& kernel) {
  const Buffers inputs = kernel.inputs(DType::f64);
  const Buffers outputs = kernel.forward(inputs, Implementation::reference, kernels::serial_for);
  const Buffers d_outputs = random_gradients(outputs);
  const Buffers got =
      kernel.backward(inputs, d_outputs, Implementation::reference, kernels::serial_for);
  ASSERT_EQ(got.size(), inputs.size());
  for (size_t i = 0; i < inputs.size(); ++i) {
    Buffers moved = inputs;
    const auto loss = [&] {
      const Buffers y = kernel.forward(moved, Implementation::reference, kernels::serial_for);
      double sum = 0;
      for (size_t j = 0; j < y.size(); ++j) {
        for (int64_t l = 0; l < y[j].size(); ++l) {
          if (!std::isnan(y[j][l])) sum += y[j][l] * d_outputs[j][l];  // NaN: between rows
        }
      }
      return sum;
    };
    const std::span<double> x(static_cast<double*>(moved[i].data()),
                              static_cast<size_t>(moved[i].size()));
    std::vector<double> want = numerical_gradient(loss, x);
    double scale = 1;
    for (int64_t j = 0; j < inputs[i].size(); ++j) {
      if (std::isnan(inputs[i][j])) want[j] = std::numeric_limits<double>::quiet_NaN();
      if (!std::isnan(want[j])) scale = std::max(scale, std::fabs(want[j]));
    }
    expect_close(got[i].values(), want, 1e-8 * scale, "gradient of input " + std::to_string(i));
  }
}

/// Each dtype under each instruction set against the reference in fp64. Outputs may differ by their
/// own rounding and by kernel.roundings() roundings of fp32 at the largest output, the bound of
/// what fp32 arithmetic on the way does.
template <typename Kernel>
void expect_simd_matches(const Kernel& kernel) {
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
    SCOPED_TRACE("half ulp " + std::to_string(half_ulp(dtype)));
    const Buffers inputs = kernel.inputs(dtype);
    const Buffers exact = as_double(inputs);
    const Buffers outputs = kernel.forward(exact, Implementation::reference, kernels::serial_for);
    const auto expect_all = [&](const Buffers& got, const Buffers& want, const std::string& what) {
      ASSERT_EQ(got.size(), want.size());
      for (size_t i = 0; i < got.size(); ++i) {
        double scale = 0;
        for (const double value : want[i].values()) {
          if (std::isfinite(value)) scale = std::max(scale, std::fabs(value));
        }
        const double smallest = std::ldexp(1.0, -25);  // half of fp16's smallest number
        expect_close(got[i].values(), want[i].values(),
                     {kernel.roundings() * half_ulp(DType::f32) * scale + smallest,
                      1.01 * half_ulp(got[i].dtype())},
                     what + " " + std::to_string(i));
      }
    };
    for_each_target([&] {
      const Buffers got = kernel.forward(inputs, Implementation::simd, kernels::serial_for);
      expect_all(got, outputs, "output");
      const Buffers d_outputs = random_gradients(got);
      expect_all(kernel.backward(inputs, d_outputs, Implementation::simd, kernels::serial_for),
                 kernel.backward(exact, as_double(d_outputs), Implementation::reference,
                                 kernels::serial_for),
                 "gradient of input");
    });
  }
}

/// The same bits however the work is spread.
template <typename Kernel>
void expect_threads_agree(const Kernel& kernel) {
  const Buffers inputs = kernel.inputs(DType::f32);
  const auto run = [&](ParallelFor parallel_for) {
    Buffers results = kernel.forward(inputs, Implementation::simd, parallel_for);
    const Buffers gradients =
        kernel.backward(inputs, random_gradients(results), Implementation::simd, parallel_for);
    results.insert(results.end(), gradients.begin(), gradients.end());
    return results;
  };
  const Buffers one = run(kernels::serial_for);
  const Buffers two = run(backwards_on_two_threads);
  for (size_t i = 0; i < one.size(); ++i) {
    EXPECT_TRUE(one[i].same_bytes(two[i])) << "result " << i;
  }
}

}  // namespace gdn::test
