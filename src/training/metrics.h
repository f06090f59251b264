// What a training run reports, and who listens.
#pragma once

#include <cstdint>
#include <memory>
#include <string_view>
#include <vector>

#include <gdn/training/evaluate.h>

namespace gdn {

struct StepMetrics {
  int64_t step = 0;              ///< optimiser steps done
  int64_t steps = 0;             ///< of this many
  int64_t tokens = 0;            ///< tokens trained on so far
  double epoch = 0;              ///< passes over the data so far
  double loss = 0;               ///< mean over the step's predicted tokens, in nats
  double lr = 0;                 ///< learning rate of the step
  double grad_norm = 0;          ///< before clipping
  double tokens_per_second = 0;  ///< since the last record, without evaluation and checkpoints
  double eta_seconds = 0;        ///< to the last step
  int64_t memory_bytes = 0;      ///< of the process now; on a GPU the most that tensors took
};

struct EvalMetrics {
  int64_t step = 0;
  EvalResult result;
};

/// Listener. Steps come every time; `record` says whether this one is due (log_every).
class MetricsSink {
 public:
  virtual ~MetricsSink() = default;
  virtual void on_message(std::string_view /*text*/) {}
  virtual void on_step(const StepMetrics& /*metrics*/, bool /*record*/) {}
  virtual void on_eval(const EvalMetrics& /*metrics*/) {}
};

/// Passes everything on to several listeners.
class MetricsFanOut : public MetricsSink {
 public:
  void add(MetricsSink& sink) { sinks_.push_back(&sink); }
  void on_message(std::string_view text) override;
  void on_step(const StepMetrics& metrics, bool record) override;
  void on_eval(const EvalMetrics& metrics) override;

 private:
  std::vector<MetricsSink*> sinks_;
};

}  // namespace gdn
