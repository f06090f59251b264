// The one comparison of numbers in the tests.
#pragma once

#include <cmath>
#include <iterator>
#include <limits>
#include <string_view>

#include <gtest/gtest.h>

namespace gdn::test {

/// |got - want| <= absolute + relative * |want|. A plain number is the absolute bound.
struct Tolerance {
  Tolerance(double absolute, double relative = 0) : absolute(absolute), relative(relative) {}

  double absolute;
  double relative;
};

/// Compares two ranges of numbers element by element. A NaN or infinity where the other side has
/// none (or another one) is reported first; else the position that exceeds its bound the most.
template <typename Got, typename Want>
void expect_close(const Got& got, const Want& want, Tolerance tolerance, std::string_view name) {
  ASSERT_EQ(std::size(got), std::size(want)) << name << ": number of elements";
  auto g = std::begin(got);
  auto w = std::begin(want);
  size_t worst = 0;
  size_t failures = 0;
  double worst_excess = 0;
  double worst_got = 0;
  double worst_want = 0;
  for (size_t i = 0; i < std::size(got); ++i, ++g, ++w) {
    const double a = static_cast<double>(*g);
    const double b = static_cast<double>(*w);
    if (!std::isfinite(a) || !std::isfinite(b)) {
      const bool same = (std::isnan(a) && std::isnan(b)) || a == b;
      ASSERT_TRUE(same) << name << "[" << i << "]: got " << a << ", expected " << b;
      continue;
    }
    const double excess =
        std::fabs(a - b) - (tolerance.absolute + tolerance.relative * std::fabs(b));
    if (excess <= 0) continue;
    ++failures;
    if (excess > worst_excess) {
      worst = i;
      worst_excess = excess;
      worst_got = a;
      worst_want = b;
    }
  }
  EXPECT_EQ(failures, 0U) << name << ": " << failures << " of " << std::size(got)
                          << " elements differ, the worst at [" << worst << "]: got " << worst_got
                          << ", expected " << worst_want << ", difference "
                          << worst_got - worst_want << ", tolerance " << tolerance.absolute << " + "
                          << tolerance.relative << " * |expected|";
}

}  // namespace gdn::test
