#include <array>
#include <optional>
#include <string>
#include <utility>

#include <ATen/ATen.h>

#include <gdn/models/decode_step.h>
#include <gdn/models/sampling.h>
#include <gdn/models/token_source.h>
#include <gdn/ops/cuda/graph.h>
#include <gdn/ops/utils/log_choice.h>

namespace gdn {
namespace {

/// The random numbers of a batch's rows.
class Draws {
 public:
  explicit Draws(std::vector<std::mt19937_64> generators) : generators_(std::move(generators)) {}

  int64_t rows() const { return static_cast<int64_t>(generators_.size()); }

  /// The next number of each row into `uniforms` [B] fp64 on the CPU.
  void fill(const at::Tensor& uniforms) {
    auto* out = uniforms.mutable_data_ptr<double>();
    for (auto& generator : generators_) *out++ = uniform(generator);
  }

  void keep_rows(const at::Tensor& index) {
    std::vector<std::mt19937_64> kept;
    for (int64_t i = 0; i < index.numel(); ++i)
      kept.push_back(generators_[index[i].item<int64_t>()]);
    generators_ = std::move(kept);
  }

 private:
  std::vector<std::mt19937_64> generators_;
};

/// Runs the model for every token, by a DecodeStep if there is one.
class Forwards : public TokenSource {
 public:
  Forwards(GatedDeltaNetForCausalLM& model, std::optional<DecodeStep> step, Cache cache,
           at::Tensor logits, const GenerateOptions& options, Draws draws)
      : model_(model),
        step_(std::move(step)),
        cache_(std::move(cache)),
        logits_(std::move(logits)),
        options_(options),
        draws_(std::move(draws)) {}

  const at::Tensor& next() override {
    if (tokens_.defined() && step_) {
      logits_ = step_->forward(tokens_);
    } else if (tokens_.defined()) {
      const at::Tensor ids = tokens_.unsqueeze(1).to(logits_.device());
      logits_ = model_->forward({.input_ids = ids, .cache = &cache_}).logits.select(1, 0);
    }
    const at::Tensor uniforms = at::empty({draws_.rows()}, at::kDouble);
    draws_.fill(uniforms);
    tokens_ = sample_tokens(logits_, uniforms.to(logits_.device()), options_).to(at::kCPU);
    return tokens_;
  }

  bool should_shrink(int64_t rows, int64_t going_on) const override { return going_on < rows; }

  void keep_rows(const at::Tensor& index) override {
    step_ ? step_->select_rows(index) : cache_.select_rows(index);
    draws_.keep_rows(index);
    tokens_ = tokens_.index_select(0, index);
  }

 private:
  GatedDeltaNetForCausalLM& model_;
  std::optional<DecodeStep> step_;
  Cache cache_;  // without a step
  at::Tensor logits_;
  const GenerateOptions& options_;
  Draws draws_;
  at::Tensor tokens_;
};

/// Replays a captured step. It reads the tokens that the last one has sampled, so the next step is
/// queued before the host has seen them.
class Replays : public TokenSource {
 public:
  Replays(GatedDeltaNetForCausalLM& model, Cache cache, const at::Tensor& logits,
          const GenerateOptions& options, Draws draws)
      : step_(model, std::move(cache)),
        options_(options),
        draws_(std::move(draws)),
        steps_left_(options.max_new_tokens - 1) {
    start_batch(draws_.rows(), logits.device());
    tokens_ = sample_tokens(logits, next_uniforms(), options_);
    copy_.emplace(tokens_);
  }

  const at::Tensor& next() override {
    copy_->start(tokens_);
    if (steps_left_ > 0) queue_step();
    return copy_->wait();
  }

  /// A row costs little beside the weights, and another batch size another capture.
  bool should_shrink(int64_t rows, int64_t going_on) const override { return 2 * going_on <= rows; }

  void keep_rows(const at::Tensor& index) override {
    const at::Tensor on_device = index.to(tokens_.device());
    graph_.reset();
    step_.select_rows(on_device);
    draws_.keep_rows(index);
    tokens_ = tokens_.index_select(0, on_device);
    start_batch(draws_.rows(), tokens_.device());
    copy_.emplace(tokens_);
  }

 private:
  void start_batch(int64_t rows, c10::Device device) {
    uniforms_ = at::empty({rows}, at::TensorOptions(at::kDouble).device(device));
    for (at::Tensor& numbers : host_uniforms_) {
      numbers = at::empty({rows}, at::TensorOptions(at::kDouble).pinned_memory(true));
    }
  }

  /// The rows' next random numbers, in the same memory each time. The host's are in one of two
  /// buffers: what was queued two steps ago is done, since its tokens have come.
  const at::Tensor& next_uniforms() {
    if (options_.temperature == 0) return uniforms_;
    std::swap(host_uniforms_[0], host_uniforms_[1]);
    draws_.fill(host_uniforms_[0]);
    return uniforms_.copy_(host_uniforms_[0], /*non_blocking=*/true);
  }

  void queue_step() {
    --steps_left_;
    next_uniforms();
    if (graph_) return graph_->replay();
    graph_.emplace(tokens_.device());
    graph_->capture(
        [this] { tokens_.copy_(sample_tokens(step_.forward(tokens_), uniforms_, options_)); });
  }

  DecodeStep step_;
  const GenerateOptions& options_;
  Draws draws_;
  int64_t steps_left_;
  at::Tensor tokens_, uniforms_;
  std::array<at::Tensor, 2> host_uniforms_;
  std::optional<cuda::HostCopy> copy_;
  std::optional<cuda::Graph> graph_;  // last: it waits before the tensors go
};

}  // namespace

std::unique_ptr<TokenSource> make_token_source(GatedDeltaNetForCausalLM& model, Cache cache,
                                               const at::Tensor& logits,
                                               const GenerateOptions& options,
                                               std::vector<std::mt19937_64> generators) {
  Draws draws(std::move(generators));
  const std::string why_not = DecodeStep::why_not(model->config());
  constexpr const char* kWhy = "every layer's state has a constant size";
  if (why_not.empty() && logits.is_cuda()) {
    log_choice("generate: CUDA graph", kWhy);
    return std::make_unique<Replays>(model, std::move(cache), logits, options, std::move(draws));
  }
  std::optional<DecodeStep> step;
  if (why_not.empty()) {
    log_choice("generate: five operators a layer", kWhy);
    step.emplace(model, std::move(cache));
  } else {
    log_choice("generate: the model's forward", why_not);
  }
  return std::make_unique<Forwards>(model, std::move(step), std::move(cache), logits, options,
                                    std::move(draws));
}

}  // namespace gdn
