#include <sstream>

#include <nlohmann/json.hpp>

#include <gdn/training/metrics_files.h>

namespace gdn {
namespace {

const std::filesystem::path& without_later_steps(const std::filesystem::path& file,
                                                 int64_t last_step) {
  if (!std::filesystem::exists(file)) return file;
  std::istringstream lines(read_text(file));
  std::string kept;
  for (std::string line; std::getline(lines, line);) {
    const auto json = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
    // A line cut off by a crash is no JSON.
    if (json.is_object() && json.value("step", int64_t{0}) <= last_step) kept += line + "\n";
  }
  write_text_atomically(file, kept);
  return file;
}

}  // namespace

JsonLines::JsonLines(const std::filesystem::path& file, int64_t last_step)
    : file_(without_later_steps(file, last_step), OutputFile::Mode::append) {}

void JsonLines::on_step(const StepMetrics& metrics, bool record) {
  if (!record) return;
  const nlohmann::ordered_json json = {{"step", metrics.step},
                                       {"tokens", metrics.tokens},
                                       {"epoch", metrics.epoch},
                                       {"loss", metrics.loss},
                                       {"lr", metrics.lr},
                                       {"grad_norm", metrics.grad_norm},
                                       {"tokens_per_second", metrics.tokens_per_second},
                                       {"memory_bytes", metrics.memory_bytes},
                                       {"eta_seconds", metrics.eta_seconds}};
  file_.write(json.dump() + "\n");
  file_.flush();
}

void JsonLines::on_eval(const EvalMetrics& metrics) {
  nlohmann::ordered_json json = {{"step", metrics.step},
                                 {"eval_loss", metrics.result.loss},
                                 {"eval_perplexity", metrics.result.perplexity}};
  if (metrics.result.bits_per_byte) json["eval_bits_per_byte"] = *metrics.result.bits_per_byte;
  json["eval_tokens"] = metrics.result.tokens;
  json["eval_seconds"] = metrics.result.seconds;
  file_.write(json.dump() + "\n");
  file_.flush();
}

void TensorBoard::on_step(const StepMetrics& metrics, bool record) {
  if (!record) return;
  writer_.write(metrics.step, {{"train/loss", metrics.loss},
                               {"train/lr", metrics.lr},
                               {"train/grad_norm", metrics.grad_norm},
                               {"speed/tokens_per_second", metrics.tokens_per_second},
                               {"speed/memory_gb", static_cast<double>(metrics.memory_bytes) / 1e9},
                               {"speed/eta_seconds", metrics.eta_seconds}});
}

void TensorBoard::on_eval(const EvalMetrics& metrics) {
  std::vector<Scalar> scalars = {{"eval/loss", metrics.result.loss},
                                 {"eval/perplexity", metrics.result.perplexity}};
  if (metrics.result.bits_per_byte) {
    scalars.push_back({"eval/bits_per_byte", *metrics.result.bits_per_byte});
  }
  writer_.write(metrics.step, scalars);
}

}  // namespace gdn
