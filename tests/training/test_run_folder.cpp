#include <gdn/training/run_folder.h>

#include "support.h"

namespace gdn {
namespace {

TEST(RunFolder, FindsTheLatestCompleteCheckpoint) {
  const testing::TestFolder folder;
  const RunFolder run(folder.path());
  EXPECT_FALSE(run.latest_checkpoint().has_value());
  for (const char* name : {"step-9", "step-10", ".step-11.tmp", "step-", "step-12x"}) {
    std::filesystem::create_directories(folder / (std::string("checkpoints/") + name));
  }
  folder.write("checkpoints/step-13", "no folder");
  EXPECT_EQ(run.latest_checkpoint(), folder / "checkpoints/step-10");
}

}  // namespace
}  // namespace gdn
