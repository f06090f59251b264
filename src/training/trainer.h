// Training of a language model, from options to a model folder.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>

#include <gdn/training/evaluate.h>
#include <gdn/training/metrics.h>
#include <gdn/training/options.h>

namespace gdn {

struct TrainResult {
  bool finished = false;  ///< false: stopped on request; a checkpoint is saved
  int64_t step = 0;       ///< optimiser steps done
  /// After the last step; absent when stopped.
  std::optional<EvalResult> evaluation = std::nullopt;
};

/// Trains, and leaves in options.out:
///   config.json, model.safetensors, gdn_tokenizer.json   the finished model
///   train_options.json                                   every option of the run
///   metrics.jsonl, events.out.tfevents.*                 metrics, for programs and TensorBoard
///   checkpoints/step-N/                                  model folders with the optimiser's state
///   data/train, data/eval                                token folders made from text
///
/// `sink` hears everything beside these files. `stop_requested` is asked after every step: when it
/// says yes, a checkpoint is saved and train() returns. Resuming continues bit for bit, given the
/// same number of threads.
///
/// Throws std::invalid_argument for options that cannot be, and std::runtime_error for the rest:
/// data that is missing, empty or too short, a run folder in use without resume, a resumed run with
/// other model options, a loss or gradient that is not finite (named with its batch and the first
/// tensor), no disk space. Nothing that existed before is overwritten.
TrainResult train(const TrainOptions& options, MetricsSink& sink,
                  const std::function<bool()>& stop_requested = {});

}  // namespace gdn
