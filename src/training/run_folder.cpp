#include <algorithm>
#include <map>
#include <stdexcept>

#include <ATen/CPUGeneratorImpl.h>
#include <nlohmann/json.hpp>

#include <gdn/models/atomic_file.h>
#include <gdn/models/checkpoint.h>
#include <gdn/models/safetensors.h>
#include <gdn/training/files.h>
#include <gdn/training/options.h>
#include <gdn/training/run_folder.h>
#include <gdn/training/tokenizer.h>

namespace gdn {
namespace {

namespace fs = std::filesystem;

constexpr char kLockFile[] = ".lock";
constexpr char kOptimizerFile[] = "optimizer.safetensors";
constexpr char kStateFile[] = "trainer.json";
constexpr char kRandomState[] = "random_state.cpu";
constexpr std::string_view kStepPrefix = "step-";

/// Complete checkpoints by step.
std::map<int64_t, fs::path> list_checkpoints(const fs::path& folder) {
  std::map<int64_t, fs::path> checkpoints;
  if (!fs::exists(folder)) return checkpoints;
  for (const auto& entry : fs::directory_iterator(folder)) {
    const std::string name = entry.path().filename().string();
    if (!name.starts_with(kStepPrefix)) continue;
    const std::string step = name.substr(kStepPrefix.size());
    const bool number = !step.empty() && step.size() < 19 &&
                        step.find_first_not_of("0123456789") == std::string::npos;
    if (number && entry.is_directory()) checkpoints[std::stoll(step)] = entry.path();
  }
  return checkpoints;
}

std::string state_text(const TrainerState& state) {
  const nlohmann::ordered_json json = {{"step", state.step},
                                       {"position", state.position},
                                       {"seq_len", state.seq_len},
                                       {"seed", state.seed},
                                       {"data_documents", state.data_documents},
                                       {"data_tokens", state.data_tokens}};
  return json.dump(2) + "\n";
}

}  // namespace

void RunFolder::require_no_run() const {
  for (const char* name :
       {kTrainOptionsFile, "config.json", "model.safetensors", "model.safetensors.index.json",
        kTokenizerFile, "tokenizer.model", "metrics.jsonl", "checkpoints"}) {
    if (!fs::exists(out_ / name)) continue;
    throw std::runtime_error(out_.string() + ": already holds " + name +
                             "; resume that run or choose another folder");
  }
}

void RunFolder::lock() {
  fs::create_directories(out_);
  lock_.emplace(out_ / kLockFile, "another process is training in this folder");
}

std::optional<fs::path> RunFolder::latest_checkpoint() const {
  const auto all = list_checkpoints(checkpoints());
  if (all.empty()) return std::nullopt;
  return all.rbegin()->second;
}

void RunFolder::save_checkpoint(GatedDeltaNetForCausalLM& model, const Tokenizer& tokenizer,
                                const AdamW& optimizer, const TrainerState& state,
                                int64_t keep) const {
  const std::string name = std::string(kStepPrefix) + std::to_string(state.step);
  const fs::path target = checkpoints() / name;
  if (fs::exists(target)) return;
  const fs::path temporary = checkpoints() / ("." + name + ".tmp");
  try {
    fs::remove_all(temporary);
    fs::create_directories(temporary);
    save_pretrained(model, temporary);
    tokenizer.save(temporary);
    NamedTensors tensors = optimizer.state();
    tensors.emplace_back(kRandomState, at::detail::getDefaultCPUGenerator().get_state());
    write_safetensors(temporary / kOptimizerFile, tensors);
    write_text_atomically(temporary / kStateFile, state_text(state));
    fs::rename(temporary, target);
    sync_folder(checkpoints());
  } catch (...) {
    std::error_code ignored;
    fs::remove_all(temporary, ignored);
    throw;
  }
  if (keep > 0) remove_old_checkpoints(keep);
}

TrainerState RunFolder::read_state(const fs::path& checkpoint) {
  const fs::path file = checkpoint / kStateFile;
  try {
    const auto json = nlohmann::json::parse(read_text(file));
    TrainerState state;
    json.at("step").get_to(state.step);
    json.at("position").get_to(state.position);
    json.at("seq_len").get_to(state.seq_len);
    json.at("seed").get_to(state.seed);
    json.at("data_documents").get_to(state.data_documents);
    json.at("data_tokens").get_to(state.data_tokens);
    return state;
  } catch (const nlohmann::json::exception& error) {
    throw std::runtime_error(file.string() + ": no trainer state: " + error.what());
  }
}

void RunFolder::restore(const fs::path& checkpoint, AdamW& optimizer) {
  const SafetensorsFile file(checkpoint / kOptimizerFile);
  for (auto& [name, tensor] : optimizer.state()) {
    const at::Tensor saved = file.tensor(name);
    if (saved.sizes() != tensor.sizes()) {
      throw std::runtime_error((checkpoint / kOptimizerFile).string() + ": tensor \"" + name +
                               "\" does not fit the model");
    }
    tensor.copy_(saved);
  }
  at::Generator generator = at::detail::getDefaultCPUGenerator();
  generator.set_state(file.tensor(kRandomState).clone());
}

void RunFolder::remove_old_checkpoints(int64_t keep) const {
  auto all = list_checkpoints(checkpoints());
  while (static_cast<int64_t>(all.size()) > keep) {
    // Renamed first: a removal that is cut short must not leave what looks like a checkpoint.
    const fs::path hidden = checkpoints() / ".removed.tmp";
    fs::remove_all(hidden);
    fs::rename(all.begin()->second, hidden);
    fs::remove_all(hidden);
    all.erase(all.begin());
  }
}

}  // namespace gdn
