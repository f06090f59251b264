#include <cstdio>
#include <optional>
#include <stdexcept>
#include <string>
#include <unistd.h>

#include <ATen/Parallel.h>
#include <CLI/CLI.hpp>

#include <gdn/cli/model_options.h>
#include <gdn/models/checkpoint.h>
#include <gdn/models/device.h>
#include <gdn/ops/common/int8_weight.h>

namespace gdn::cli {

void ModelOptions::declare(CLI::App& app) {
  app.add_option("--model", model, "Model folder, as gdn train leaves it")
      ->required()
      ->type_name("FOLDER");
  app.add_option("--tokenizer", tokenizer,
                 "'byte' or a sentencepiece model file, instead of the model folder's tokenizer");
  app.add_option("--device", device,
                 "Where to compute: cpu, cuda (the first GPU), cuda:N, or auto: a GPU where there "
                 "is one");
  app.add_option("--dtype", dtype, "Type of weights and activations")
      ->check(CLI::IsMember({"fp32", "bf16", "fp16"}));
  CLI::Option* const weights =
      app.add_option("--weight-dtype", weight_dtype,
                     "int8: round every matrix (projections, embeddings, head) as it is loaded, on "
                     "a CPU; else the weights are of --dtype")
          ->check(CLI::IsMember({"int8"}));
  app.add_option("--weight-group", weight_group,
                 "Numbers of a matrix's row that share a scale in int8, " +
                     std::string(kInt8ScaleSizes) + "; 0: the row")
      ->needs(weights)
      ->check(CLI::Validator(
          [](const std::string& text) {
            int64_t size = 0;
            const bool valid = CLI::detail::lexical_cast(text, size) && is_int8_scale_size(size);
            return valid ? "" : "must be " + std::string(kInt8ScaleSizes) + ", got " + text;
          },
          "POWER OF TWO"));
  app.add_option("--threads", threads, "CPU threads; 0: as many as torch would use")
      ->check(CLI::NonNegativeNumber);
}

GatedDeltaNetForCausalLM ModelOptions::load_model() const {
  if (threads > 0) at::set_num_threads(static_cast<int>(threads));
  const bool int8 = weight_dtype == "int8";
  const DeviceChoice choice = choose_device(int8 && device == "auto" ? "cpu" : device);
  if (int8 && !choice.device.is_cpu()) {
    throw std::invalid_argument("--weight-dtype int8 must be used with --device cpu, got " +
                                device);
  }
  if (!choice.note.empty() && isatty(STDERR_FILENO) != 0) {
    std::fprintf(stderr, "%s\n", choice.note.c_str());
  }
  const auto type = dtype == "bf16" ? at::kBFloat16 : dtype == "fp16" ? at::kHalf : at::kFloat;
  GatedDeltaNetForCausalLM loaded = load_pretrained(
      model, choice.device, type, int8 ? std::optional(weight_group) : std::nullopt);
  loaded->eval();
  if (int8 && isatty(STDERR_FILENO) != 0) {
    std::fprintf(stderr, "weights in int8: %.1f MB\n",
                 static_cast<double>(loaded->nbytes()) * 1e-6);
  }
  return loaded;
}

std::unique_ptr<Tokenizer> ModelOptions::make_tokenizer_for(
    const GatedDeltaNetConfig& config) const {
  auto result = tokenizer.empty() ? load_tokenizer(model) : make_tokenizer(tokenizer);
  if (result->vocab_size() > config.vocab_size) {
    throw std::runtime_error("the tokenizer has " + std::to_string(result->vocab_size()) +
                             " tokens, the model in " + model + " only " +
                             std::to_string(config.vocab_size));
  }
  return result;
}

}  // namespace gdn::cli
