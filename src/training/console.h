// Progress of a training run for people: a live bar on a terminal, plain lines elsewhere.
#pragma once

#include <cstdio>
#include <string>

#include <gdn/training/metrics.h>

namespace gdn {

/// "1.2k", "34.5M", "6.7B".
std::string human_count(double count);
/// "1h02m", "3m05s", "12s".
std::string human_duration(double seconds);

class ConsoleProgress : public MetricsSink {
 public:
  /// Draws a bar when `out` is a terminal.
  explicit ConsoleProgress(std::FILE* out);
  ~ConsoleProgress() override;

  void on_message(std::string_view text) override;
  void on_step(const StepMetrics& metrics, bool record) override;
  void on_eval(const EvalMetrics& metrics) override;

 private:
  void print_line(const std::string& line);
  void draw_bar(const StepMetrics& metrics);
  void clear_bar();

  std::FILE* out_;
  bool terminal_;
  bool bar_shown_ = false;
};

}  // namespace gdn
