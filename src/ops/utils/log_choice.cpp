#include <mutex>
#include <string>
#include <unordered_set>

#include <c10/util/Logging.h>

#include <gdn/ops/utils/log_choice.h>

namespace gdn {

void log_choice(std::string_view name, std::string_view reason) {
  static std::mutex mutex;
  static std::unordered_set<std::string> logged;
  thread_local std::unordered_set<std::string> seen;  // a thread locks once for a choice
  const std::string line = std::string(name) + ": " + std::string(reason);
  if (!seen.insert(line).second) return;
  const std::scoped_lock lock(mutex);
  if (logged.insert(line).second) LOG(INFO) << "gdn: " << line;
}

}  // namespace gdn
