// The subcommands of `gdn`: each declares its options and returns what to do with them.
#pragma once

#include <functional>

namespace CLI {
class App;
}

namespace gdn::cli {

/// What a command does once its options are read.
using Action = std::function<void()>;

Action add_train(CLI::App& app);
Action add_generate(CLI::App& app);
Action add_eval(CLI::App& app);
Action add_convert(CLI::App& app);
Action add_info(CLI::App& app);

}  // namespace gdn::cli
