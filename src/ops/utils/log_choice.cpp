#include <mutex>
#include <string>
#include <unordered_set>

#include <c10/util/Logging.h>

#include <gdn/ops/utils/log_choice.h>

namespace gdn {

void log_choice(std::string_view name, std::string_view reason) {
  static std::mutex mutex;
  static std::unordered_set<std::string> logged;
  const std::string line = std::string(name) + ": " + std::string(reason);
  const std::scoped_lock lock(mutex);
  if (logged.insert(line).second) LOG(INFO) << "gdn: " << line;
}

}  // namespace gdn
