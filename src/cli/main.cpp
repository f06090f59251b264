// The command `gdn`. Exit status: 0 done, 1 failed, 2 wrong usage.
#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <exception>
#include <iostream>
#include <stdexcept>
#include <string>
#include <string_view>

#include <CLI/CLI.hpp>
#include <c10/util/Exception.h>

#include <gdn/cli/command.h>
#include <gdn/cli/json_options.h>

namespace gdn::cli {
namespace {

constexpr int kFailed = 1;
constexpr int kWrongUsage = 2;

struct Command {
  const char* name;
  const char* summary;
  Action (*add)(CLI::App&);
};

constexpr std::array kCommands = {
    Command{"train", "Trains a Gated DeltaNet language model, or resumes a run.", add_train},
    Command{"generate", "Continues prompts with a trained model.", add_generate},
    Command{"eval", "Measures a model's loss, perplexity and bits per byte on text.", add_eval},
    Command{"convert", "Converts Gated DeltaNet layers of transformers' models to ours, and back.",
            add_convert},
    Command{"info", "Shows versions, devices, and which kernels are chosen.", add_info},
};

/// One line on standard error, whatever line breaks the message has.
void complain(const std::string& who, std::string message) {
  while (!message.empty() && message.back() == '\n') message.pop_back();
  std::replace(message.begin(), message.end(), '\n', ' ');
  std::fprintf(stderr, "%s: %s\n", who.c_str(), message.c_str());
}

int report_parse_error(const CLI::App& app, const CLI::ParseError& error) {
  if (error.get_exit_code() == 0) return app.exit(error);  // --help, --version
  complain(app.get_name(), std::string(error.what()) + " (see " + app.get_name() + " --help)");
  return kWrongUsage;
}

int run_command(const Command& command, int argc, char** argv) {
  CLI::App app(command.summary, "gdn " + std::string(command.name));
  app.option_defaults()->always_capture_default();
  const Action action = command.add(app);
  add_options_file(app);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return report_parse_error(app, error);
  }
  try {
    action();
    if (!std::cout.flush() || std::fflush(stdout) != 0) {
      throw std::runtime_error(std::string("cannot write standard output: ") +
                               std::strerror(errno));
    }
    return 0;
  } catch (const std::invalid_argument& error) {
    complain(app.get_name(), error.what());
    return kWrongUsage;
  } catch (const c10::Error& error) {
    complain(app.get_name(), error.what_without_backtrace());
  } catch (const std::exception& error) {
    complain(app.get_name(), error.what());
  }
  return kFailed;
}

int run(int argc, char** argv) {
  const std::string_view name = argc > 1 ? argv[1] : "";
  for (const Command& command : kCommands) {
    if (name == command.name) return run_command(command, argc - 1, argv + 1);
  }
  if (!name.empty() && !name.starts_with("-")) {
    complain("gdn", "unknown command '" + std::string(name) + "' (see gdn --help)");
    return kWrongUsage;
  }
  CLI::App app("Gated DeltaNet language models: train, generate, evaluate.", "gdn");
  app.set_version_flag("--version", GDN_VERSION);
  app.require_subcommand(1);
  for (const Command& command : kCommands) app.add_subcommand(command.name, command.summary);
  app.footer("gdn COMMAND --help lists a command's options with defaults and units.");
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return report_parse_error(app, error);
  }
  return kWrongUsage;
}

}  // namespace
}  // namespace gdn::cli

int main(int argc, char** argv) { return gdn::cli::run(argc, argv); }
