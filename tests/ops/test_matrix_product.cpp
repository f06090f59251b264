// Products of matrices by torch, and which library makes them.
#include <support/tensor.h>

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <gdn/ops/utils/matrix_product.h>

namespace gdn::test {
namespace {

/// Of the largest element, how far `got` is from a b in fp64.
double error(const at::Tensor& got, const at::Tensor& a, const at::Tensor& b) {
  const at::Tensor want = at::mm(a.to(at::kDouble), b.to(at::kDouble));
  return ((got.to(at::kDouble) - want).abs().max() / want.abs().max()).item<double>();
}

TEST(MatrixLibrary, SixteenBitsWithoutInstructionsForThemAreMultipliedInFp32) {
  for (const at::ScalarType dtype : {at::kBFloat16, at::kHalf}) {
    EXPECT_TRUE(matrix_library(dtype, /*is_x86=*/true, /*has_avx512=*/false).in_fp32);
    EXPECT_FALSE(matrix_library(dtype, true, false, kFewRows - 1).in_fp32);
    EXPECT_FALSE(matrix_library(dtype, true, true).in_fp32);
    EXPECT_FALSE(matrix_library(dtype, false, false).in_fp32);
  }
  EXPECT_FALSE(matrix_library(at::kFloat, true, false).in_fp32);
  EXPECT_FALSE(matrix_library(at::kDouble, true, false).in_fp32);
}

TEST(MatrixLibrary, ProductsInFp32AreRoundedOnce) {
  torch::manual_seed(1);
  for (const at::ScalarType dtype : {at::kBFloat16, at::kHalf}) {
    const double rounding = dtype == at::kHalf ? 0x1p-11 : 0x1p-8;
    const at::Tensor a = torch::randn({5, 2100}).to(dtype),
                     b = torch::randn({4300, 2100}).to(dtype);
    at::Tensor out = torch::empty({5, 4300}, dtype);
    product_in_fp32(out, a, b.t());  // more than one copy's columns
    EXPECT_LT(error(out, a, b.t()), rounding);
  }
  at::Tensor none = torch::full({2, 3}, 7.0, at::kBFloat16);
  product_in_fp32(none, torch::empty({2, 0}, at::kBFloat16), torch::empty({0, 3}, at::kBFloat16));
  EXPECT_EQ(none.abs().max().item<float>(), 0);
}

TEST(MatrixLibrary, EveryFormIsTheProduct) {
  torch::manual_seed(2);
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16, at::kHalf}) {
    const double rounding = dtype == at::kFloat ? 1e-6 : dtype == at::kHalf ? 0x1p-10 : 0x1p-7;
    for (const int64_t rows : {int64_t{1}, kFewRows - 1, kFewRows, int64_t{40}}) {
      const at::Tensor a = torch::randn({rows, 24}).to(dtype), b = torch::randn({24, 10}).to(dtype);
      EXPECT_LT(error(matrix_product(a, b), a, b), rounding);
      EXPECT_LT(error(linear_product(a.view({rows, 1, 24}), b.t()).flatten(0, 1), a, b), rounding);
      at::Tensor out = torch::empty({rows, 10}, dtype);
      matrix_product_out(out, a, b);
      EXPECT_LT(error(out, a, b), rounding);
      for (const at::ScalarType sums : {dtype, at::kFloat}) {
        at::Tensor sum = torch::ones({rows, 10}, sums);
        add_matrix_product(sum, a, b);
        EXPECT_LT(error(sum - 1, a, b), 2 * rounding);
        EXPECT_EQ(sum.scalar_type(), sums);
      }
    }
  }
}

}  // namespace
}  // namespace gdn::test
