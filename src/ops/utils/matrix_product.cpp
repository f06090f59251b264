#include <algorithm>

#include <ATen/ATen.h>
#include <ATen/cpu/Utils.h>

#include <gdn/ops/utils/log_choice.h>
#include <gdn/ops/utils/matrix_product.h>

namespace gdn {
namespace {

#if defined(__x86_64__)
constexpr bool kX86 = true;
#else
constexpr bool kX86 = false;
#endif

/// Whether a product with `rows` rows is made in fp32.
bool in_fp32(const at::Tensor& a, const c10::SymInt& rows) {
  if (!a.is_cpu() || a.scalar_type() == at::kFloat || a.scalar_type() == at::kDouble) return false;
  const std::optional<int64_t> known = rows.maybe_as_int();
  const MatrixLibrary library = matrix_library(a.scalar_type(), known.value_or(kFewRows));
  log_choice(library.name, library.reason);
  return library.in_fp32;
}

}  // namespace

MatrixLibrary matrix_library(at::ScalarType dtype, bool is_x86, bool has_avx512, int64_t rows) {
  if (dtype == at::kFloat || dtype == at::kDouble) {
    return {"torch (MKL)", "as fast as oneDNN in fp32 on every processor that was measured"};
  }
  if (!is_x86) return {"torch", "not measured on this kind of processor"};
  if (has_avx512) return {"torch (oneDNN)", "it multiplies 16 bits with AVX-512 and AMX"};
  if (rows < kFewRows) return {"torch", "a few rows: the weights are read once"};
  return {"torch (MKL), in fp32",
          "without AVX-512 products of 16 bits are several times slower than those of fp32",
          /*in_fp32=*/true};
}

MatrixLibrary matrix_library(at::ScalarType dtype, int64_t rows) {
  static const auto processor = at::cpu::get_cpu_capabilities();
  static const bool has_avx512 = kX86 && processor.at("avx512_bw").toBool();
  return matrix_library(dtype, kX86, has_avx512, rows);
}

void product_in_fp32(at::Tensor& out, const at::Tensor& a, const at::Tensor& b) {
  constexpr int64_t kElements = 4 << 20;
  const int64_t K = b.size(0), N = b.size(1);
  const int64_t columns = std::max<int64_t>(1, kElements / std::max<int64_t>(K, 1));
  const at::Tensor left = a.to(at::kFloat);
  for (int64_t begin = 0; begin < N; begin += columns) {
    const int64_t count = std::min(columns, N - begin);
    out.narrow(1, begin, count).copy_(at::mm(left, b.narrow(1, begin, count).to(at::kFloat)));
  }
}

at::Tensor matrix_product(const at::Tensor& a, const at::Tensor& b) {
  if (!in_fp32(a, a.sym_size(0))) return at::mm(a, b);
  at::Tensor out = at::empty({a.size(0), b.size(1)}, a.options());
  product_in_fp32(out, a, b);
  return out;
}

void matrix_product_out(at::Tensor& out, const at::Tensor& a, const at::Tensor& b) {
  if (in_fp32(a, a.sym_size(0))) {
    product_in_fp32(out, a, b);
  } else {
    at::mm_out(out, a, b);
  }
}

void add_matrix_product(at::Tensor& sum, const at::Tensor& a, const at::Tensor& b) {
  if (sum.scalar_type() == a.scalar_type() && !in_fp32(a, a.sym_size(0))) {
    sum.addmm_(a, b);
  } else {
    sum.add_(matrix_product(a, b));
  }
}

at::Tensor linear_product(const at::Tensor& x, const at::Tensor& weight) {
  if (!in_fp32(x, x.sym_numel() / std::max<c10::SymInt>(x.sym_size(-1), 1))) {
    return at::linear(x, weight);
  }
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.back() = weight.size(0);
  at::Tensor out = at::empty(sizes, x.options());
  at::Tensor rows = out.flatten(0, -2);
  product_in_fp32(rows, x.flatten(0, -2), weight.t());
  return out;
}

}  // namespace gdn
