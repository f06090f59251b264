// `gdn convert`.
#include <filesystem>
#include <iostream>
#include <memory>
#include <stdexcept>
#include <string>

#include <CLI/CLI.hpp>

#include <gdn/cli/command.h>
#include <gdn/models/convert.h>

namespace gdn::cli {
namespace {

struct Options {
  std::string model, base, out;
};

void run(const Options& options) {
  const bool back = holds_layers(options.model);
  if (back && options.base.empty()) {
    throw std::invalid_argument("--base is needed to convert the layers of " + options.model +
                                " back: the transformers model that has everything else");
  }
  if (!back && !options.base.empty()) {
    throw std::invalid_argument("--base is only for layers that gdn convert wrote; " +
                                options.model + " holds a model");
  }
  const Conversion done = back ? convert_to_transformers(options.model, options.base, options.out)
                               : convert_from_transformers(options.model, options.out);
  std::cout << done.model_type << ": " << done.tensors << " tensors of " << done.layers.size()
            << " Gated DeltaNet layers written to " << options.out << "; " << done.others
            << " other tensors " << (back ? "as in " + options.base : "not converted") << "\n";
}

}  // namespace

Action add_convert(CLI::App& app) {
  const auto options = std::make_shared<Options>();
  app.add_option("--model", options->model,
                 "Model folder of transformers (Qwen3-Next, Qwen3.5, OLMo-Hybrid), or layers that "
                 "this command wrote")
      ->required()
      ->type_name("FOLDER");
  app.add_option("--out", options->out, "Folder to make; must not exist")
      ->required()
      ->type_name("FOLDER");
  app.add_option("--base", options->base,
                 "To convert layers back: the transformers model folder that is copied, with these "
                 "layers in place of its own")
      ->type_name("FOLDER");
  return [options] { run(*options); };
}

}  // namespace gdn::cli
