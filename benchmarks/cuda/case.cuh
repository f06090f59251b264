// A kernel on one problem: checked against the fp64 reference, and timed beside a copy.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

#include <gdn/kernels/cuda/device.cuh>

#include "measure.cuh"

namespace gdn::benchmarks {

using namespace gdn::kernels;

/// Normal numbers that every type has: multiples of 1/64 below 4.
template <typename T>
__global__ void fill(T* x, int64_t count, uint64_t seed) {
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count;
       i += int64_t{gridDim.x} * blockDim.x) {
    x[i] = static_cast<T>(fminf(fmaxf(rintf(normal(i, seed) * 64), -255.0F), 255.0F) / 64);
  }
}

/// Calls body with the element type that dtype stands for.
template <typename Body>
void with_type(DType dtype, const Body& body) {
  if (dtype == DType::f64) return body(static_cast<double*>(nullptr));
  cuda::with_element_type(dtype, body);
}

/// Arrays of one problem: on the device in their dtypes, or for the reference on the host in fp64.
/// The same sequence of calls gives the same numbers in both.
class Memory {
 public:
  explicit Memory(bool on_host) : on_host_(on_host) {}
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() {
    for (void* array : on_device_) cudaFree(array);
  }

  DType dtype(DType asked) const { return on_host_ ? DType::f64 : asked; }

  /// Random numbers; `skip` elements before them make them less aligned.
  void* input(DType asked, int64_t count, int64_t skip = 0) {
    return array(asked, count, skip, ++seed_, true);
  }
  /// NaN until it is written.
  void* output(DType asked, int64_t count, int64_t skip = 0) {
    void* data = array(asked, count, skip, 0, false);
    outputs_.push_back({data, dtype(asked), count});
    return data;
  }
  /// What these integers become in the memory of the problem.
  const int64_t* integers(const std::vector<int64_t>& values) {
    if (on_host_) return integers_.emplace_back(values).data();
    auto* data = static_cast<int64_t*>(allocate(values.size() * 8));
    check(cudaMemcpy(data, values.data(), values.size() * 8, cudaMemcpyHostToDevice), "integers");
    return data;
  }
  void* scratch(int64_t bytes) {
    void* data = allocate(bytes);
    check(cudaMemset(data, 0xFF, bytes), "scratch");
    return data;
  }

  std::vector<std::vector<double>> results() const {
    std::vector<std::vector<double>> all;
    for (const Output& output : outputs_) all.push_back(values(output));
    return all;
  }

 private:
  struct Output {
    void* data;
    DType dtype;
    int64_t count;
  };

  void* allocate(int64_t bytes) {
    void* data = nullptr;
    check(cudaMalloc(&data, std::max<int64_t>(bytes, 1)), "cudaMalloc");
    on_device_.push_back(data);
    return data;
  }

  void* array(DType asked, int64_t count, int64_t skip, uint64_t seed, bool random) {
    void* result = nullptr;
    with_type(dtype(asked), [&]<typename T>(T*) {
      T* data = static_cast<T*>(allocate((count + skip) * sizeof(T))) + skip;
      check(cudaMemset(data, 0xFF, count * sizeof(T)), "poison");
      if (random && count > 0) fill<<<1024, 256>>>(data, count, seed);
      check(cudaDeviceSynchronize(), "fill");
      result = data;
      if (!on_host_) return;
      on_host_arrays_.emplace_back(count);
      result = on_host_arrays_.back().data();
      check(cudaMemcpy(result, data, count * sizeof(T), cudaMemcpyDeviceToHost), "to the host");
    });
    return result;
  }

  std::vector<double> values(const Output& output) const {
    std::vector<double> result(output.count);
    with_type(output.dtype, [&]<typename T>(T*) {
      std::vector<T> raw(output.count);
      check(cudaMemcpy(raw.data(), output.data, raw.size() * sizeof(T), cudaMemcpyDefault),
            "results");
      for (size_t i = 0; i < raw.size(); ++i) {
        if constexpr (sizeof(T) == 2) {
          result[i] = static_cast<float>(raw[i]);
        } else {
          result[i] = raw[i];
        }
      }
    });
    return result;
  }

  bool on_host_;
  uint64_t seed_ = 0;
  std::vector<void*> on_device_;
  std::vector<std::vector<double>> on_host_arrays_;
  std::vector<std::vector<int64_t>> integers_;
  std::vector<Output> outputs_;
};

/// A kernel on one problem. The problem is made anew for every Memory; it has been run when `make`
/// returns what runs it.
struct Case {
  std::string name;
  double bytes;  // that must be read or written
  DType dtype;
  std::function<std::function<void(cudaStream_t)>(Memory&, bool reference)> make;
};

inline int failures = 0;

/// The elements of every result against the reference: the rounding of the result's dtype, and
/// what sums in fp32 leave of the largest element.
inline void check_case(const Case& c) {
  Memory on_host(true), on_device(false);
  c.make(on_host, true)(nullptr);
  const auto run = c.make(on_device, false);
  run(nullptr);
  check(cudaDeviceSynchronize(), c.name.c_str());
  const auto want = on_host.results(), got = on_device.results();
  const double rounding = c.dtype == DType::f32    ? 0
                          : c.dtype == DType::bf16 ? 1.0 / 256
                                                   : 1.0 / 2048;
  double worst = 0;  // in units of what is allowed
  for (size_t k = 0; k < want.size(); ++k) {
    double largest = 1e-30;
    for (const double x : want[k]) largest = std::max(largest, std::abs(x));
    for (size_t i = 0; i < want[k].size(); ++i) {
      const double allowed = rounding * std::abs(want[k][i]) + 4e-6 * largest;
      const double error = std::abs(got[k][i] - want[k][i]) / allowed;
      if (!(error <= worst)) worst = std::isnan(error) ? INFINITY : error;
    }
  }
  run(nullptr);
  check(cudaDeviceSynchronize(), c.name.c_str());
  const bool same = on_device.results() == got;
  if (worst <= 1 && same) return;
  ++failures;
  std::printf("WRONG %s: %.2g of the allowed error%s\n", c.name.c_str(), worst,
              same ? "" : ", other bits in the second run");
}

__global__ void copy_kernel(const uint4* from, uint4* to) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  to[i] = from[i];
}

/// Bytes a second, read and written.
inline double copy_rate() {
  constexpr int64_t kBytes = int64_t{1} << 29;
  Memory memory(false);
  auto* from = static_cast<uint4*>(memory.input(DType::f32, kBytes / 4));
  auto* to = static_cast<uint4*>(memory.scratch(kBytes));
  return 2e3 * kBytes / time([=](cudaStream_t stream) {
           copy_kernel<<<kBytes / 16 / 256, 256, 0, stream>>>(from, to);
         });
}

inline void time_case(const Case& c, double rate) {
  Memory memory(false);
  const double ms = time(c.make(memory, false));
  const double floor = 1e3 * c.bytes / rate;
  std::printf("%-60s %9.1f us  floor %7.1f  %5.1f%%\n", c.name.c_str(), 1e3 * ms, 1e3 * floor,
              100 * floor / ms);
  std::fflush(stdout);
}

}  // namespace gdn::benchmarks
