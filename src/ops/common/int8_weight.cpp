#include <algorithm>
#include <string>

#include <ATen/ATen.h>

#include <gdn/ops/common/int8_weight.h>
#include <gdn/ops/utils/check.h>
#include <gdn/ops/utils/matrix_product.h>
#include <gdn/ops/utils/views.h>

namespace gdn {
namespace {

constexpr int64_t kSmallestGroup = 32;
constexpr float kLargest = 127;

/// Each group's scale for each of its inputs: [N, groups] -> [N, D].
at::Tensor spread(const at::Tensor& scales, int64_t D) {
  if (scales.size(1) == 1) return scales;
  return scales.repeat_interleave(int8_scale_size(D, scales.size(1)), 1).narrow(1, 0, D);
}

/// Calls body(first, count) for the rows of a weight, as many at a time as stay in the cache.
template <typename Body>
void for_row_blocks(const at::Tensor& weight, const Body& body) {
  constexpr int64_t kElements = 1 << 19;
  const int64_t N = weight.size(0);
  const int64_t rows = std::max<int64_t>(1, kElements / std::max<int64_t>(1, weight.size(1)));
  for (int64_t n = 0; n < N; n += rows) body(n, std::min(rows, N - n));
}

}  // namespace

bool is_int8_scale_size(int64_t scale_size) {
  const bool power = (scale_size & (scale_size - 1)) == 0;
  return scale_size == 0 || (scale_size >= kSmallestGroup && power);
}

int64_t int8_scale_size(int64_t D, int64_t groups) {
  if (groups == 1) return D;
  int64_t size = kSmallestGroup;
  while ((D + size - 1) / size > groups) size *= 2;
  return size;
}

Int8Weight round_to_int8(const at::Tensor& weight, int64_t scale_size) {
  constexpr std::string_view kOp = "round_to_int8";
  check_floating(kOp, "weight", weight);
  check_shape(kOp, "weight", weight, {-1, -1}, "[N, D]");
  if (!is_int8_scale_size(scale_size)) {
    reject(kOp, "scale_size", kInt8ScaleSizes, std::to_string(scale_size));
  }
  const at::NoGradGuard no_grad;
  const int64_t D = weight.size(1), Q = scale_size == 0 ? D : std::min(scale_size, D);
  const int64_t groups = (D + Q - 1) / Q;
  const Int8Weight rounded = {at::empty(weight.sizes(), at::kChar),
                              at::empty({weight.size(0), groups}, at::kFloat)};
  for_row_blocks(weight, [&](int64_t n, int64_t count) {
    const at::Tensor wide = weight.narrow(0, n, count).to(at::kFloat);
    const at::Tensor padded = at::constant_pad_nd(wide, {0, groups * Q - D});
    const at::Tensor scales = padded.view({count, groups, Q}).abs().amax(2) / kLargest;
    if (!scales.isfinite().all().item<bool>()) {
      reject(kOp, "weight", "of finite numbers", "infinity or NaN");
    }
    rounded.scales.narrow(0, n, count).copy_(scales);
    const at::Tensor divisors = at::where(scales == 0, 1, scales);  // zeros stay zeros
    rounded.values.narrow(0, n, count).copy_((wide / spread(divisors, D)).round_());
  });
  return rounded;
}

at::Tensor from_int8(const Int8Weight& weight, at::ScalarType dtype) {
  const int64_t D = weight.values.size(1);
  return weight.values.to(at::kFloat).mul_(spread(weight.scales, D)).to(dtype);
}

at::Tensor int8_linear(const at::Tensor& x, const Int8Weight& weight) {
  at::DimVector sizes(x.sizes());
  sizes.back() = weight.values.size(0);
  const at::Tensor y = at::empty(sizes, x.options());
  for_row_blocks(weight.values, [&](int64_t n, int64_t count) {
    const at::Tensor rows = from_int8(
        {weight.values.narrow(0, n, count), weight.scales.narrow(0, n, count)}, x.scalar_type());
    y.narrow(-1, n, count).copy_(linear_product(x, rows));
  });
  return y;
}

void check_int8_weight(std::string_view op, const at::Tensor& weight, const at::Tensor& scales,
                       const at::Tensor& x) {
  if (weight.scalar_type() != at::kChar || !weight.is_cpu() || !x.is_cpu()) {
    reject(op, "weight", "int8 on a CPU, and so x, where scales are given",
           describe(weight) + " and x on " + x.device().str());
  }
  check_shape(op, "scales", scales, {weight.sym_size(0), -1}, "[rows of the weight, groups]");
  if (scales.scalar_type() != at::kFloat || !scales.is_cpu()) {
    reject(op, "scales", "float32 on a CPU", describe(scales));
  }
  const int64_t D = weight.size(1), groups = scales.size(1);
  const int64_t size = groups > 0 ? int8_scale_size(D, groups) : D;
  if (groups < 1 || (D > 0 && (D + size - 1) / size != groups)) {
    reject(op, "scales", "of 1 or ceil(D / Q) columns, Q a power of two of at least 32",
           describe(scales));
  }
}

}  // namespace gdn
