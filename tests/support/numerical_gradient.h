// Gradients by central differences.
#pragma once

#include <span>
#include <vector>

namespace gdn::test {

/// d loss() / d x in fp64. `loss` reads x, whose elements are moved by +-step one after another.
/// With the default step the truncation (step^2) and the rounding (2^-53 / step) are about 1e-10
/// each.
template <typename Loss>
std::vector<double> numerical_gradient(const Loss& loss, std::span<double> x, double step = 1e-5) {
  std::vector<double> gradient;
  gradient.reserve(x.size());
  for (double& element : x) {
    const double value = element;
    element = value + step;
    const double above = loss();
    element = value - step;
    const double below = loss();
    element = value;
    gradient.push_back((above - below) / (2 * step));
  }
  return gradient;
}

}  // namespace gdn::test
