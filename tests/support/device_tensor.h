// Problems of the gated delta rule in device memory.
#pragma once

#include <cmath>
#include <cuda_runtime.h>
#include <limits>
#include <support/gated_delta_rule_case.h>

#include <gtest/gtest.h>

namespace gdn::test {

inline void check(cudaError_t error) { ASSERT_EQ(error, cudaSuccess) << cudaGetErrorString(error); }

/// Device memory that holds numbers of one dtype.
class DeviceArray {
 public:
  DeviceArray(kernels::DType dtype, const Values& values) : host_(dtype, values.size()) {
    for (size_t i = 0; i < values.size(); ++i) host_.set(i, values[i]);
    bytes_ = values.size() * (dtype == kernels::DType::f32 ? 4 : 2);
    check(cudaMalloc(&device_, bytes_ + 16));
    check(cudaMemcpy(device_, host_.data(), bytes_, cudaMemcpyHostToDevice));
  }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;
  ~DeviceArray() { cudaFree(device_); }

  void* data() { return device_; }
  Values values() {
    check(cudaMemcpy(host_.data(), device_, bytes_, cudaMemcpyDeviceToHost));
    return host_.values();
  }

 private:
  Array host_;
  size_t bytes_ = 0;
  void* device_ = nullptr;
};

/// A [B, T, heads, size] tensor on the device; `gap` elements of NaN behind each head.
class DeviceTensor {
 public:
  DeviceTensor(const GatedDeltaRuleCase& c, int64_t heads, int64_t gap, const Values* values,
               int64_t size = 128)
      : size_(size), gap_(gap), rows_(c.B * c.T * heads), array_(c.dtype, padded(values)) {
    const int64_t row = size + gap;
    view_ = {array_.data(), c.T * heads * row, heads * row, row};
  }
  kernels::MutableView4 view() const { return view_; }
  kernels::ConstView4 const_view() const {
    return {view_.data, view_.stride_b, view_.stride_t, view_.stride_h};
  }
  Values values() {
    const Values all = array_.values();
    Values result;
    for (int64_t row = 0; row < rows_; ++row) {
      const auto begin = all.begin() + row * (size_ + gap_);
      result.insert(result.end(), begin, begin + size_);
      for (auto x = begin + size_; x != begin + size_ + gap_; ++x) {
        EXPECT_TRUE(std::isnan(*x)) << "an element between rows was written";
      }
    }
    return result;
  }

 private:
  Values padded(const Values* values) const {
    Values result(static_cast<size_t>(rows_ * (size_ + gap_)),
                  std::numeric_limits<double>::quiet_NaN());
    for (int64_t row = 0; values != nullptr && row < rows_; ++row) {
      std::copy_n(values->begin() + row * size_, size_, result.begin() + row * (size_ + gap_));
    }
    return result;
  }

  int64_t size_, gap_, rows_;
  DeviceArray array_;
  kernels::MutableView4 view_;
};

/// Of whole tensors; absolute where fp32 has no numbers as small as the tensor.
inline double relative_error(const Values& got, const Values& want) {
  double error = 0;
  double norm = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    error += (got[i] - want[i]) * (got[i] - want[i]);
    norm += want[i] * want[i];
  }
  return std::sqrt(norm) < 1e-30 ? std::sqrt(error) : std::sqrt(error / norm);
}

inline GatedDeltaRuleCase hopper_case(int64_t B, int64_t T, int64_t H, int64_t HV, uint64_t seed) {
  return {.B = B,
          .T = T,
          .H = H,
          .HV = HV,
          .K = 128,
          .V = 128,
          .chunk_size = 64,
          .dtype = kernels::DType::bf16,
          .seed = seed};
}

}  // namespace gdn::test
