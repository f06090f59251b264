// A dense matrix with the few operations that the equations of the reference kernels need.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

namespace gdn::kernels::reference {

template <typename Real>
class Matrix {
 public:
  Matrix() = default;
  Matrix(int64_t rows, int64_t cols)
      : rows_(rows), cols_(cols), data_(static_cast<size_t>(rows * cols), Real(0)) {}

  int64_t rows() const { return rows_; }
  int64_t cols() const { return cols_; }
  Real& operator()(int64_t row, int64_t col) { return data_[row * cols_ + col]; }
  const Real& operator()(int64_t row, int64_t col) const { return data_[row * cols_ + col]; }

  Matrix transposed() const {
    Matrix result(cols_, rows_);
    for (int64_t i = 0; i < rows_; ++i) {
      for (int64_t j = 0; j < cols_; ++j) result(j, i) = (*this)(i, j);
    }
    return result;
  }

  /// Rows begin to begin + count - 1.
  Matrix slice(int64_t begin, int64_t count) const {
    Matrix result(count, cols_);
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t j = 0; j < cols_; ++j) result(i, j) = (*this)(begin + i, j);
    }
    return result;
  }

  void set_rows(int64_t begin, const Matrix& rows) {
    for (int64_t i = 0; i < rows.rows(); ++i) {
      for (int64_t j = 0; j < cols_; ++j) (*this)(begin + i, j) = rows(i, j);
    }
  }

 private:
  int64_t rows_ = 0;
  int64_t cols_ = 0;
  std::vector<Real> data_;
};

template <typename Real>
Matrix<Real> operator*(const Matrix<Real>& a, const Matrix<Real>& b) {
  Matrix<Real> result(a.rows(), b.cols());
  for (int64_t i = 0; i < a.rows(); ++i) {
    for (int64_t l = 0; l < a.cols(); ++l) {
      for (int64_t j = 0; j < b.cols(); ++j) result(i, j) += a(i, l) * b(l, j);
    }
  }
  return result;
}

template <typename Real>
Matrix<Real> operator*(Real factor, Matrix<Real> a) {
  for (int64_t i = 0; i < a.rows(); ++i) {
    for (int64_t j = 0; j < a.cols(); ++j) a(i, j) *= factor;
  }
  return a;
}

template <typename Real>
Matrix<Real> operator+(Matrix<Real> a, const Matrix<Real>& b) {
  for (int64_t i = 0; i < a.rows(); ++i) {
    for (int64_t j = 0; j < a.cols(); ++j) a(i, j) += b(i, j);
  }
  return a;
}

template <typename Real>
Matrix<Real> operator-(Matrix<Real> a, const Matrix<Real>& b) {
  for (int64_t i = 0; i < a.rows(); ++i) {
    for (int64_t j = 0; j < a.cols(); ++j) a(i, j) -= b(i, j);
  }
  return a;
}

/// The elementwise product.
template <typename Real>
Matrix<Real> hadamard(Matrix<Real> a, const Matrix<Real>& b) {
  for (int64_t i = 0; i < a.rows(); ++i) {
    for (int64_t j = 0; j < a.cols(); ++j) a(i, j) *= b(i, j);
  }
  return a;
}

/// diag(factors) a: row i times factors[i].
template <typename Real>
Matrix<Real> scale_rows(const std::vector<Real>& factors, Matrix<Real> a) {
  for (int64_t i = 0; i < a.rows(); ++i) {
    for (int64_t j = 0; j < a.cols(); ++j) a(i, j) *= factors[i];
  }
  return a;
}

/// The inner product of row i of a and row j of b.
template <typename Real>
Real dot(const Matrix<Real>& a, int64_t i, const Matrix<Real>& b, int64_t j) {
  Real sum = 0;
  for (int64_t c = 0; c < a.cols(); ++c) sum += a(i, c) * b(j, c);
  return sum;
}

/// The sum of all products of elements, <a, b>.
template <typename Real>
Real inner(const Matrix<Real>& a, const Matrix<Real>& b) {
  Real sum = 0;
  for (int64_t i = 0; i < a.rows(); ++i) sum += dot(a, i, b, i);
  return sum;
}

}  // namespace gdn::kernels::reference
