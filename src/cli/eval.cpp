// `gdn eval`.
#include <cstdio>
#include <iostream>
#include <memory>
#include <string>
#include <unistd.h>
#include <vector>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include <gdn/cli/command.h>
#include <gdn/cli/model_options.h>
#include <gdn/training/corpus.h>
#include <gdn/training/evaluate.h>

namespace gdn::cli {
namespace {

struct Options {
  ModelOptions model;
  std::vector<std::string> data;
  EvalOptions eval;
  bool json = false;
};

void show_progress(int64_t done, int64_t all) {
  std::fprintf(stderr, "\r%3.0f%%%s", 100.0 * static_cast<double>(done) / static_cast<double>(all),
               done == all ? "\r    \r" : "");
}

void print(const EvalResult& result) {
  std::printf("loss           %.4f nats per token\nperplexity     %.3f\n", result.loss,
              result.perplexity);
  if (result.bits_per_byte) std::printf("bits per byte  %.4f\n", *result.bits_per_byte);
  std::printf("documents      %ld, %ld tokens, %.1f s\n", result.documents, result.tokens,
              result.seconds);
}

nlohmann::ordered_json to_json(const EvalResult& result) {
  nlohmann::ordered_json json = {{"loss", result.loss},      {"perplexity", result.perplexity},
                                 {"bits_per_byte", nullptr}, {"documents", result.documents},
                                 {"tokens", result.tokens},  {"bytes", result.bytes},
                                 {"seconds", result.seconds}};
  if (result.bits_per_byte) json["bits_per_byte"] = *result.bits_per_byte;
  return json;
}

void run(const Options& options) {
  GatedDeltaNetForCausalLM model = options.model.load_model();
  const auto tokenizer = options.model.make_tokenizer_for(model->config());
  EvalOptions eval = options.eval;
  if (isatty(STDERR_FILENO) != 0) eval.on_progress = show_progress;
  const EvalResult result = evaluate(model, open_corpus(options.data, *tokenizer), eval);
  if (options.json) {
    std::cout << to_json(result).dump() << "\n";
  } else {
    print(result);
  }
}

}  // namespace

Action add_eval(CLI::App& app) {
  const auto options = std::make_shared<Options>();
  options->model.declare(app);
  app.add_option("--data", options->data,
                 "Files or folders of text (each file is a document), or token folders")
      ->required()
      ->type_name("PATH ...");
  app.add_option("--window", options->eval.window,
                 "Tokens of a document in one forward; the state is carried over")
      ->check(CLI::PositiveNumber);
  app.add_option("--batch-size", options->eval.batch_size, "Documents side by side")
      ->check(CLI::PositiveNumber);
  app.add_flag("--json", options->json, "Print one line of JSON");
  return [options] { run(*options); };
}

}  // namespace gdn::cli
