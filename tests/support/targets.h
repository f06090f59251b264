// Runs a test under every instruction set that this machine has and the kernels are compiled for,
// and under the best one with the matrix unit too, where there is one.
#pragma once

#include <gtest/gtest.h>
#include <hwy/targets.h>

#include <gdn/kernels/cpu/matrix_unit.h>

namespace gdn::test {

template <typename Body>
void for_each_target(const Body& body) {
  hwy::SetSupportedTargetsForTest(0);
  kernels::cpu::allow_matrix_unit(false);
  for (const int64_t target : hwy::SupportedAndGeneratedTargets()) {
    SCOPED_TRACE(hwy::TargetName(target));
    hwy::SetSupportedTargetsForTest(target);
    hwy::GetChosenTarget().Update(hwy::SupportedTargets());
    body();
  }
  hwy::SetSupportedTargetsForTest(0);
  hwy::GetChosenTarget().Update(hwy::SupportedTargets());
  kernels::cpu::allow_matrix_unit(true);
  if (!kernels::cpu::uses_matrix_unit()) return;
  SCOPED_TRACE("matrix unit");
  body();
}

}  // namespace gdn::test
