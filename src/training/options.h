// Options of a training run: one struct for the command line, JSON files and the run's record.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include <nlohmann/json_fwd.hpp>

#include <gdn/models/config.h>

namespace gdn {

class Tokenizer;

/// The record of a run's options in its folder.
inline constexpr char kTrainOptionsFile[] = "train_options.json";

/// Field names are the flags' names with underscores. for_each_option() lists them with their help.
struct TrainOptions {
  std::vector<std::string> data;
  std::vector<std::string> eval_data;
  std::vector<std::string> suffix;
  std::string out;
  std::string tokenizer = "byte";

  std::string preset;  ///< empty: tiny-byte, unless there is a config
  std::string config;
  std::optional<int64_t> hidden_size;
  std::optional<int64_t> layers;
  std::optional<int64_t> heads;
  std::optional<int64_t> head_dim;
  std::optional<double> expand_v;

  int64_t steps = 1000;
  int64_t batch_size = 8;
  int64_t seq_len = 1024;
  int64_t grad_accumulation = 1;
  double lr = 1e-3;
  int64_t warmup = 100;
  double min_lr_ratio = 0.1;
  double weight_decay = 0.1;
  double beta1 = 0.9;
  double beta2 = 0.95;
  double max_grad_norm = 1.0;
  uint64_t seed = 0;

  int64_t log_every = 10;
  int64_t eval_every = 250;
  int64_t eval_tokens = 500'000;
  int64_t save_every = 250;
  int64_t keep_checkpoints = 2;
  bool resume = false;

  std::string device = "auto";
  std::string dtype = "fp32";
  bool activation_checkpointing = false;
  int64_t threads = 0;

  /// Throws std::invalid_argument that names the first flag that cannot be, and its value.
  void validate() const;
};

/// Calls visit(name, field, help) for every option, in the order of the help text.
template <typename Options, typename Visit>
void for_each_option(Options& options, Visit&& visit) {
  visit("data", options.data,
        "files or folders of text (each file is a document), or folders of token files");
  visit("eval_data", options.eval_data,
        "held-out files or folders; default: a tenth of the documents of --data");
  visit("suffix", options.suffix,
        "take only files with these endings from folders (.py); default: all that look like text");
  visit("out", options.out, "run folder: the model, checkpoints, metrics and token files");
  visit("tokenizer", options.tokenizer, "'byte', or a sentencepiece model file");
  visit("preset", options.preset, "model size: tiny-byte (default), 30M, 125M, 400M or 1.3B");
  visit("config", options.config, "model configuration (config.json) instead of a preset");
  visit("hidden_size", options.hidden_size, "width of the model, instead of the preset's");
  visit("layers", options.layers, "number of layers, instead of the preset's");
  visit("heads", options.heads, "number of heads, instead of the preset's");
  visit("head_dim", options.head_dim, "size of a query or key head, instead of the preset's");
  visit("expand_v", options.expand_v, "size of a value head over head_dim");
  visit("steps", options.steps, "optimiser steps");
  visit("batch_size", options.batch_size, "sequences of seq-len tokens in one forward");
  visit("seq_len", options.seq_len, "longest sequence in tokens; longer documents are cut");
  visit("grad_accumulation", options.grad_accumulation, "forwards in one optimiser step");
  visit("lr", options.lr, "peak learning rate");
  visit("warmup", options.warmup, "steps of linear warm-up; a cosine follows");
  visit("min_lr_ratio", options.min_lr_ratio, "last learning rate over the peak");
  visit("weight_decay", options.weight_decay, "AdamW's decay of matrices; nothing else decays");
  visit("beta1", options.beta1, "AdamW's decay of the gradient's mean");
  visit("beta2", options.beta2, "AdamW's decay of the gradient's square");
  visit("max_grad_norm", options.max_grad_norm, "clip the gradient to this norm; 0: never");
  visit("seed", options.seed, "of the initial weights and the order of the data");
  visit("log_every", options.log_every, "steps between two records of metrics");
  visit("eval_every", options.eval_every, "steps between two evaluations; 0: only at the end");
  visit("eval_tokens", options.eval_tokens, "held-out tokens in one evaluation; 0: all");
  visit("save_every", options.save_every, "steps between two checkpoints; 0: only at the end");
  visit("keep_checkpoints", options.keep_checkpoints, "newest checkpoints that are kept; 0: all");
  visit("resume", options.resume, "continue the run in --out from its latest checkpoint");
  visit("device", options.device, "cpu, cuda, cuda:N, or auto: the first GPU if there is one");
  visit("dtype", options.dtype,
        "fp32; bf16: autocast over fp32 weights; or bf16-weights: weights and optimiser in bf16 "
        "too, half the memory, but small updates are rounded away");
  visit("activation_checkpointing", options.activation_checkpointing,
        "recompute activations in the backward, which saves memory");
  visit("threads", options.threads, "CPU threads; 0: as many as torch would use");
}

/// A key a field. Reading leaves fields without a key as they are in `defaults`; throws
/// std::invalid_argument that names an unknown key or one with a value of the wrong type.
nlohmann::json train_options_to_json(const TrainOptions& options);
TrainOptions train_options_from_json(const nlohmann::json& json, const TrainOptions& defaults = {});

/// The options with which the run in folder `out` was started: with --resume, what the command line
/// leaves open. Throws std::runtime_error when there is no run.
TrainOptions recorded_train_options(const std::filesystem::path& out);

/// The model that the options ask for: preset or configuration file, the flags that change it, and
/// the tokenizer's vocabulary. Throws std::invalid_argument.
GatedDeltaNetConfig model_config(const TrainOptions& options, const Tokenizer& tokenizer);

}  // namespace gdn
