#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include <gdn/cli/json_options.h>

namespace gdn::cli {
namespace {

std::string to_input(const std::string& key, const nlohmann::json& value) {
  if (value.is_string()) return value.get<std::string>();
  if (value.is_number() || value.is_boolean()) return value.dump();
  throw CLI::ConfigError("--options: '" + key +
                         "' must be a string, a number, true, false or a list of them, got " +
                         value.dump());
}

/// Reads a configuration file for CLI11.
class JsonOptions : public CLI::Config {
 public:
  explicit JsonOptions(const CLI::App& app) : app_(app) {}

  std::vector<CLI::ConfigItem> from_config(std::istream& input) const override {
    nlohmann::json object;
    try {
      object = nlohmann::json::parse(input);
    } catch (const nlohmann::json::parse_error& error) {
      throw CLI::ConfigError("--options: not JSON, " + std::string(error.what()));
    }
    if (!object.is_object()) throw CLI::ConfigError("--options: the file must hold an object");

    std::vector<CLI::ConfigItem> items;
    for (const auto& [key, value] : object.items()) {
      CLI::ConfigItem item;
      item.name = key;
      std::replace(item.name.begin(), item.name.end(), '_', '-');
      const CLI::Option* option = app_.get_option_no_throw("--" + item.name);
      if (option == nullptr || !option->get_configurable()) {
        throw CLI::ConfigError("--options: unknown option '" + key + "'");
      }
      if (value.is_null() || (value.is_array() && value.empty())) continue;
      for (const auto& element : value.is_array() ? value : nlohmann::json::array({value})) {
        item.inputs.push_back(to_input(key, element));
      }
      items.push_back(std::move(item));
    }
    return items;
  }

  std::string to_config(const CLI::App*, bool, bool, std::string) const override { return {}; }

 private:
  const CLI::App& app_;
};

}  // namespace

void add_options_file(CLI::App& app) {
  app.set_config("--options", "", "JSON file with options by name; the command line wins")
      ->type_name("FILE");
  app.config_formatter(std::make_shared<JsonOptions>(app));
}

}  // namespace gdn::cli
