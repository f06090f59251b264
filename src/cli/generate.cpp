// `gdn generate`.
#include <iostream>
#include <iterator>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include <gdn/cli/command.h>
#include <gdn/cli/model_options.h>
#include <gdn/cli/text_stream.h>
#include <gdn/models/generate.h>

namespace gdn::cli {
namespace {

struct Options {
  ModelOptions model;
  std::vector<std::string> prompts;
  std::vector<std::string> stops;
  GenerateOptions generate;
  std::string state_dtype = "fp32";
  bool json = false;
};

/// Texts in the order of their prompts: the first unfinished one as it comes, the others when it is
/// their turn.
class Printer {
 public:
  Printer(const std::vector<std::string>& prompts, bool json)
      : prompts_(prompts), rows_(prompts.size()), json_(json) {
    begin_row();
  }

  void add(size_t row, const std::string& text) {
    rows_[row].text += text;
    if (row == current_ && !json_) std::cout << text << std::flush;
  }

  void finish(size_t row, int64_t tokens, bool stopped) {
    rows_[row].tokens = tokens;
    rows_[row].stopped = stopped;
    rows_[row].finished = true;
    while (current_ < rows_.size() && rows_[current_].finished) {
      end_row();
      ++current_;
      begin_row();
    }
  }

 private:
  struct Row {
    std::string text;
    int64_t tokens = 0;
    bool stopped = false;
    bool finished = false;
  };

  void begin_row() {
    if (json_ || current_ == rows_.size()) return;
    if (rows_.size() > 1) std::cout << "--- " << prompts_[current_] << "\n";
    std::cout << rows_[current_].text << std::flush;
  }

  void end_row() {
    const Row& row = rows_[current_];
    if (json_) {
      const nlohmann::ordered_json line = {{"prompt", prompts_[current_]},
                                           {"text", row.text},
                                           {"tokens", row.tokens},
                                           {"finish", row.stopped ? "stop" : "length"}};
      std::cout << line.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
    }
    std::cout << std::endl;
  }

  const std::vector<std::string>& prompts_;
  std::vector<Row> rows_;
  size_t current_ = 0;
  bool json_;
};

void run(Options options) {
  GatedDeltaNetForCausalLM model = options.model.load_model();
  const auto tokenizer = options.model.make_tokenizer_for(model->config());
  if (options.prompts.empty()) {
    options.prompts.emplace_back(std::istreambuf_iterator<char>(std::cin),
                                 std::istreambuf_iterator<char>());
  }

  std::vector<std::vector<int64_t>> prompts;
  for (const std::string& prompt : options.prompts) {
    prompts.push_back(tokenizer->encode_prompt(prompt));
  }
  if (options.state_dtype == "bf16") options.generate.state_dtype = at::kBFloat16;
  options.generate.stop_tokens = {tokenizer->eos_id()};

  Printer printer(options.prompts, options.json);
  std::vector<TextStream> streams(prompts.size(), TextStream(options.stops));
  std::vector<int64_t> counts(prompts.size(), 0);
  generate(model, prompts, options.generate, [&](int64_t row, int64_t token) {
    TextStream& stream = streams[row];
    const bool end = token == tokenizer->eos_id();
    printer.add(row, stream.append(tokenizer->token_text(token)));
    ++counts[row];
    if (end || stream.stopped() || counts[row] == options.generate.max_new_tokens) {
      printer.add(row, stream.finish());
      printer.finish(row, counts[row], end || stream.stopped());
      return false;
    }
    return true;
  });
}

}  // namespace

Action add_generate(CLI::App& app) {
  const auto options = std::make_shared<Options>();
  GenerateOptions& generate = options->generate;
  options->model.declare(app);
  app.add_option("--prompt", options->prompts,
                 "Text to continue; several are continued at once. Default: standard input")
      ->type_name("TEXT ...");
  app.add_option("--max-new-tokens", generate.max_new_tokens, "Tokens to generate for each prompt")
      ->check(CLI::PositiveNumber);
  app.add_option("--temperature", generate.temperature,
                 "Divides the logits; 0: the likeliest token")
      ->check(CLI::NonNegativeNumber);
  app.add_option("--top-k", generate.top_k, "Draw from the k likeliest tokens; 0: from all")
      ->check(CLI::NonNegativeNumber);
  app.add_option("--top-p", generate.top_p,
                 "Draw from the likeliest tokens that together have this probability")
      ->check(CLI::Range(0.0, 1.0));
  app.add_option("--seed", generate.seed, "Of the random draws");
  app.add_option("--state-dtype", options->state_dtype,
                 "Type of the states between tokens, bf16 on a CPU alone")
      ->check(CLI::IsMember({"fp32", "bf16"}));
  app.add_option("--stop", options->stops, "Text at which a continuation ends, not shown itself")
      ->type_name("TEXT ...");
  app.add_flag("--json", options->json, "Print a line of JSON for each prompt");
  return [options] { run(*options); };
}

}  // namespace gdn::cli
