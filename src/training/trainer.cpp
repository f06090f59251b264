#include <algorithm>
#include <chrono>
#include <cmath>
#include <fstream>
#include <stdexcept>
#include <unistd.h>

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/zeros.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <nlohmann/json.hpp>

#include <gdn/models/causal_lm.h>
#include <gdn/models/checkpoint.h>
#include <gdn/models/device.h>
#include <gdn/training/autocast.h>
#include <gdn/training/corpus.h>
#include <gdn/training/files.h>
#include <gdn/training/metrics_files.h>
#include <gdn/training/non_finite.h>
#include <gdn/training/optimizer.h>
#include <gdn/training/run_folder.h>
#include <gdn/training/sampler.h>
#include <gdn/training/schedule.h>
#include <gdn/training/tokenizer.h>
#include <gdn/training/trainer.h>

namespace gdn {
namespace {

namespace fs = std::filesystem;
using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

/// Of the process; on a GPU the most that its tensors ever took.
int64_t memory_bytes(c10::Device device) {
  if (!device.is_cpu()) {
    const auto stats = c10::getDeviceAllocator(device.type())->getDeviceStats(device.index());
    return stats.allocated_bytes[static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE)]
        .peak;
  }
  int64_t total = 0, resident = 0;
  std::ifstream("/proc/self/statm") >> total >> resident;
  return resident * ::sysconf(_SC_PAGESIZE);
}

at::Tensor to_tensor(const std::vector<int64_t>& values) {
  auto* data = const_cast<int64_t*>(values.data());
  return at::from_blob(data, {static_cast<int64_t>(values.size())}, at::kLong).clone();
}

/// The batches of one optimiser step; their losses add up to the mean over all predicted tokens.
struct StepData {
  std::vector<Batch> batches;
  int64_t predicted = 0;
  int64_t position = 0;  ///< of the sampler, after them
  double epoch = 0;
};

/// Every token but the first of each sequence is predicted.
int64_t predicted_tokens(const Batch& batch) {
  return static_cast<int64_t>(batch.input_ids.size() - batch.sequences.size());
}

NamedTensors named_parameters(GatedDeltaNetForCausalLM& model) {
  NamedTensors parameters;
  for (const auto& item : model->named_parameters())
    parameters.emplace_back(item.key(), item.value());
  return parameters;
}

/// "hidden_size: 256 in the checkpoint, 512 asked for" of the first difference.
void require_same_model(const GatedDeltaNetConfig& saved, const GatedDeltaNetConfig& asked,
                        const fs::path& checkpoint) {
  const nlohmann::json a = config_to_json(saved), b = config_to_json(asked);
  for (const auto& [key, value] : b.items()) {
    if (a.contains(key) && a[key] == value) continue;
    throw std::invalid_argument(key + " must stay as in " + checkpoint.string() + ", " +
                                (a.contains(key) ? a[key].dump() : "absent") + ", got " +
                                value.dump());
  }
}

class Trainer {
 public:
  Trainer(const TrainOptions& options, MetricsSink& sink)
      : options_(options), folder_(options.out), sink_(sink) {
    if (options_.threads > 0) at::set_num_threads(static_cast<int>(options_.threads));
    if (options_.resume) {
      recorded_ = recorded_train_options(folder_.path());
      folder_.lock();
    } else {
      folder_.require_no_run();
    }
    open_tokenizer();
    config_ = model_config(options_, *tokenizer_);
    open_device();
    open_data();
    make_model();
    record_options();
    open_metrics();
  }

  TrainResult run(const std::function<bool()>& stop_requested) {
    const auto begin = Clock::now();
    const int64_t first_step = step_;
    auto record_begin = Clock::now();
    int64_t record_step = step_;
    double pause = 0;  // evaluations and checkpoints since the last record
    while (step_ < options_.steps) {
      StepMetrics metrics = train_step();
      const bool last = step_ == options_.steps;
      const bool record = step_ % options_.log_every == 0 || last || step_ == first_step + 1;
      const double tokens = static_cast<double>((step_ - record_step) * tokens_per_step());
      metrics.tokens_per_second = tokens / std::max(seconds_since(record_begin) - pause, 1e-9);
      metrics.eta_seconds = seconds_since(begin) / static_cast<double>(step_ - first_step) *
                            static_cast<double>(options_.steps - step_);
      metrics.memory_bytes = memory_bytes(device_);
      sinks_.on_step(metrics, record);
      if (record) {
        record_begin = Clock::now();
        record_step = step_;
        pause = 0;
      }

      const auto pause_begin = Clock::now();
      if (due(options_.eval_every) && !last) evaluate_now();
      const bool stop = !last && stop_requested && stop_requested();
      if (due(options_.save_every) || last || stop) save();
      pause += seconds_since(pause_begin);
      if (stop) {
        sinks_.on_message("stopped at step " + std::to_string(step_) +
                          ", saved; --resume goes on from there");
        return {.finished = false, .step = step_, .evaluation = std::nullopt};
      }
    }
    save_pretrained(model_, folder_.path());
    return {.finished = true, .step = step_, .evaluation = evaluate_now()};
  }

 private:
  void open_tokenizer() {
    // The run's own copy, so that a resumed run does not need the file that it began with.
    if (options_.resume && fs::exists(folder_.path() / kTokenizerFile)) {
      tokenizer_ = load_tokenizer(folder_.path());
      if (options_.tokenizer != recorded_.tokenizer &&
          make_tokenizer(options_.tokenizer)->description() != tokenizer_->description()) {
        throw std::invalid_argument("tokenizer must stay '" + recorded_.tokenizer + "', as in " +
                                    folder_.path().string() + ", got '" + options_.tokenizer + "'");
      }
    } else {
      tokenizer_ = make_tokenizer(options_.tokenizer);
    }
  }

  void open_device() {
    const DeviceChoice choice = choose_device(options_.device);
    device_ = choice.device;
    if (!choice.note.empty()) sink_.on_message(choice.note);
  }

  void open_data() {
    CorpusOptions corpus_options;
    corpus_options.suffixes = options_.suffix;
    corpus_options.message = [this](const std::string& text) { sink_.on_message(text); };
    corpus_options.cache = folder_.path() / "data" / "train";
    corpus_options.keep_cache = options_.resume;
    const Corpus all = open_corpus(options_.data, *tokenizer_, corpus_options);
    if (options_.eval_data.empty()) {
      std::tie(training_, held_out_) = all.split(*tokenizer_);
    } else {
      corpus_options.cache = folder_.path() / "data" / "eval";
      training_ = all;
      held_out_ = open_corpus(options_.eval_data, *tokenizer_, corpus_options);
    }
    held_out_ = held_out_.sample(options_.eval_tokens, *tokenizer_);
    if (held_out_.tokens() == 0) {
      throw std::invalid_argument("eval_data must be given: a tenth of the data is too little");
    }
    sampler_.emplace(training_, options_.seq_len, options_.batch_size * options_.seq_len,
                     options_.seed);
  }

  void make_model() {
    at::manual_seed(options_.seed);  // of every device: gates are drawn on the CPU
    const auto checkpoint = folder_.latest_checkpoint();
    const auto dtype = options_.dtype == "bf16-weights" ? at::kBFloat16 : at::kFloat;
    if (checkpoint) {
      require_same_model(read_config(*checkpoint / "config.json"), config_, *checkpoint);
      model_ = load_pretrained(*checkpoint, device_, dtype);
    } else {
      model_ = GatedDeltaNetForCausalLM(config_, device_);
      model_->to(dtype);
    }
    model_->train();
    model_->set_activation_checkpointing(options_.activation_checkpointing);
    parameters_ = named_parameters(model_);
    optimizer_.emplace(parameters_, AdamWOptions{.beta1 = options_.beta1,
                                                 .beta2 = options_.beta2,
                                                 .weight_decay = options_.weight_decay});
    if (checkpoint) resume_from(*checkpoint);
  }

  void resume_from(const fs::path& checkpoint) {
    const TrainerState saved = RunFolder::read_state(checkpoint);
    const TrainerState now = state();
    const auto require = [&](const char* name, auto before, auto asked) {
      if (before == asked) return;
      throw std::invalid_argument(std::string(name) + " must stay as in " + checkpoint.string() +
                                  ", " + std::to_string(before) + ", got " + std::to_string(asked));
    };
    require("seq_len", saved.seq_len, now.seq_len);
    require("seed", saved.seed, now.seed);
    require("the number of training documents", saved.data_documents, now.data_documents);
    require("the number of training tokens", saved.data_tokens, now.data_tokens);
    RunFolder::restore(checkpoint, *optimizer_);
    step_ = saved.step;
    position_ = saved.position;
    sampler_->seek(saved.position);
    sink_.on_message("resuming from " + checkpoint.string());
  }

  void record_options() {
    if (!options_.resume) {  // not sooner: bad input leaves no folder behind
      folder_.lock();
      folder_.require_no_run();
    }
    write_text_atomically(folder_.path() / kTrainOptionsFile,
                          train_options_to_json(options_).dump(2) + "\n");
    if (!options_.resume || !fs::exists(folder_.path() / kTokenizerFile)) {
      tokenizer_->save(folder_.path());
    }
  }

  void open_metrics() {
    json_lines_.emplace(folder_.path() / "metrics.jsonl", step_);
    tensor_board_.emplace(folder_.path());
    sinks_.add(*json_lines_);
    sinks_.add(*tensor_board_);
    sinks_.add(sink_);
    sinks_.on_message(std::to_string(model_->parameter_count()) + " parameters, " +
                      std::to_string(training_.tokens()) + " tokens in " +
                      std::to_string(training_.documents()) + " documents to train on, " +
                      std::to_string(held_out_.tokens()) + " in " +
                      std::to_string(held_out_.documents()) + " held out");
  }

  StepData next_data() {
    StepData data;
    for (int64_t i = 0; i < options_.grad_accumulation; ++i) {
      data.batches.push_back(sampler_->next());
      data.predicted += predicted_tokens(data.batches.back());
    }
    data.position = sampler_->position();
    data.epoch = sampler_->epoch();
    return data;
  }

  StepMetrics train_step() {
    const StepData data = next_ ? *std::exchange(next_, std::nullopt) : next_data();
    const double lr = learning_rate({.lr = options_.lr,
                                     .warmup = options_.warmup,
                                     .steps = options_.steps,
                                     .min_lr_ratio = options_.min_lr_ratio},
                                    step_);
    const at::Tensor mean_loss = accumulate_gradients(data);
    // A GPU computes while the CPU prepares what comes next; reading the loss waits for it.
    if (step_ + 1 < options_.steps) next_ = next_data();
    const double loss = mean_loss.item<double>();
    const double norm = optimizer_->clip_grad_norm(options_.max_grad_norm);
    if (!std::isfinite(loss) || !std::isfinite(norm)) stop_at_non_finite(data, loss, norm);
    optimizer_->step(lr);
    optimizer_->zero_grad();
    ++step_;
    position_ = data.position;
    return {.step = step_,
            .steps = options_.steps,
            .tokens = data.position,
            .epoch = data.epoch,
            .loss = loss,
            .lr = lr,
            .grad_norm = norm};
  }

  /// Returns the mean loss, on the device.
  at::Tensor accumulate_gradients(const StepData& data) {
    at::Tensor mean = at::zeros({}, at::TensorOptions().dtype(at::kDouble).device(device_));
    for (const Batch& batch : data.batches) {
      const double weight = static_cast<double>(predicted_tokens(batch)) /
                            static_cast<double>(std::max<int64_t>(data.predicted, 1));
      CausalLMInput input;
      input.input_ids = to_tensor(batch.input_ids).to(device_).unsqueeze(0);  // [1, T]
      // In host memory: the operators' checks then need not wait for the device.
      input.cu_seqlens = to_tensor(batch.cu_seqlens);  // [N + 1]
      input.labels = input.input_ids;
      at::Tensor loss;
      {
        const Bf16Autocast autocast(options_.dtype == "bf16", device_.type());
        loss = model_->forward(input).loss;
      }
      (loss * weight).backward();
      mean += weight * loss.detach().to(at::kDouble);
    }
    return mean;
  }

  [[noreturn]] void stop_at_non_finite(const StepData& data, double loss, double norm) {
    std::optional<std::string> tensor = first_non_finite(parameters_);
    if (!tensor) {
      optimizer_->zero_grad();
      tensor = first_non_finite_operator([&] { accumulate_gradients(data); }, parameters_);
    }
    std::string text = "step " + std::to_string(step_ + 1) + ": ";
    text += std::isfinite(loss) ? "the norm of the gradient is " + std::to_string(norm)
                                : "the loss is " + std::to_string(loss);
    text += "; first tensor that is not finite: " + tensor.value_or("none, when run again");
    text += "; batch: ";
    for (const Batch& batch : data.batches) text += sampler_->describe(batch) + "; ";
    const auto checkpoint = folder_.latest_checkpoint();
    text += "last good checkpoint: " + (checkpoint ? checkpoint->string() : "none");
    throw std::runtime_error(text);
  }

  EvalResult evaluate_now() {
    const EvalMetrics metrics = {step_,
                                 evaluate(model_, held_out_, {.bf16 = options_.dtype == "bf16"})};
    sinks_.on_eval(metrics);
    return metrics.result;
  }

  TrainerState state() const {
    return {.step = step_,
            .position = position_,
            .seq_len = options_.seq_len,
            .seed = options_.seed,
            .data_documents = training_.documents(),
            .data_tokens = training_.tokens()};
  }

  void save() {
    folder_.save_checkpoint(model_, *tokenizer_, *optimizer_, state(), options_.keep_checkpoints);
  }

  bool due(int64_t every) const { return every > 0 && step_ % every == 0; }

  int64_t tokens_per_step() const {
    return options_.grad_accumulation * options_.batch_size * options_.seq_len;
  }

  TrainOptions options_, recorded_;
  RunFolder folder_;
  MetricsSink& sink_;
  std::unique_ptr<Tokenizer> tokenizer_;
  GatedDeltaNetConfig config_;
  Corpus training_, held_out_;
  std::optional<Sampler> sampler_;
  GatedDeltaNetForCausalLM model_{nullptr};
  NamedTensors parameters_;
  std::optional<AdamW> optimizer_;
  std::optional<JsonLines> json_lines_;
  std::optional<TensorBoard> tensor_board_;
  MetricsFanOut sinks_;
  c10::Device device_ = c10::kCPU;
  std::optional<StepData> next_;  ///< prepared while the last step ran
  int64_t step_ = 0;
  int64_t position_ = 0;  ///< in the data, after the last step
};

}  // namespace

TrainResult train(const TrainOptions& options, MetricsSink& sink,
                  const std::function<bool()>& stop_requested) {
  options.validate();
  return Trainer(options, sink).run(stop_requested);
}

}  // namespace gdn
