// Runs a test under every instruction set that this machine has and the kernels are compiled for.
#pragma once

#include <gtest/gtest.h>
#include <hwy/targets.h>

namespace gdn::test {

template <typename Body>
void for_each_target(const Body& body) {
  hwy::SetSupportedTargetsForTest(0);
  for (const int64_t target : hwy::SupportedAndGeneratedTargets()) {
    SCOPED_TRACE(hwy::TargetName(target));
    hwy::SetSupportedTargetsForTest(target);
    hwy::GetChosenTarget().Update(hwy::SupportedTargets());
    body();
  }
  hwy::SetSupportedTargetsForTest(0);
  hwy::GetChosenTarget().Update(hwy::SupportedTargets());
}

}  // namespace gdn::test
