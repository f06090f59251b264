// `gdn train`.
#include <algorithm>
#include <csignal>
#include <cstdio>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include <gdn/cli/command.h>
#include <gdn/training/console.h>
#include <gdn/training/options.h>
#include <gdn/training/stop_signals.h>
#include <gdn/training/trainer.h>

namespace gdn::cli {
namespace {

std::string flag_of(std::string field) {
  std::replace(field.begin(), field.end(), '_', '-');
  return "--" + field;
}

/// The options that were given, on top of the run's own (with --resume) or the defaults.
TrainOptions merge(const CLI::App& app, const TrainOptions& options) {
  const nlohmann::json all = train_options_to_json(options);
  nlohmann::json given = nlohmann::json::object();
  for (const auto& [field, value] : all.items()) {
    if (app.count(flag_of(field)) > 0) given[field] = value;
  }
  return train_options_from_json(
      given, options.resume ? recorded_train_options(options.out) : TrainOptions{});
}

void run(const TrainOptions& options) {
  // Who watches the progress may leave; the run goes on.
  std::signal(SIGPIPE, SIG_IGN);
  ConsoleProgress progress(stdout);
  const StopSignals signals;
  const TrainResult result = train(options, progress, [&] { return signals.requested(); });
  if (!result.finished) {
    throw std::runtime_error("stopped after step " + std::to_string(result.step) +
                             "; continue with --resume --out " + options.out);
  }
}

}  // namespace

Action add_train(CLI::App& app) {
  const auto options = std::make_shared<TrainOptions>();
  for_each_option(*options, [&app](const char* field, auto& value, const char* help) {
    if constexpr (std::is_same_v<std::remove_cvref_t<decltype(value)>, bool>) {
      app.add_flag(flag_of(field), value, help);
    } else {
      app.add_option(flag_of(field), value, help);
    }
  });
  return [options, &app] { run(merge(app, *options)); };
}

}  // namespace gdn::cli
