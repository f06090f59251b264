// Metrics in files: metrics.jsonl for programs, and event files for TensorBoard.
#pragma once

#include <filesystem>

#include <gdn/training/files.h>
#include <gdn/training/metrics.h>
#include <gdn/training/tensorboard.h>

namespace gdn {

/// One JSON object a line: {"step": 10, "loss": ...} or {"step": 10, "eval_loss": ...}.
class JsonLines : public MetricsSink {
 public:
  /// Appends to `file`, after dropping what an interrupted run recorded beyond `last_step`.
  JsonLines(const std::filesystem::path& file, int64_t last_step);

  void on_step(const StepMetrics& metrics, bool record) override;
  void on_eval(const EvalMetrics& metrics) override;

 private:
  OutputFile file_;
};

class TensorBoard : public MetricsSink {
 public:
  explicit TensorBoard(const std::filesystem::path& folder) : writer_(folder) {}

  void on_step(const StepMetrics& metrics, bool record) override;
  void on_eval(const EvalMetrics& metrics) override;

 private:
  TensorBoardWriter writer_;
};

}  // namespace gdn
