#include <gdn/training/metrics.h>

namespace gdn {

void MetricsFanOut::on_message(std::string_view text) {
  for (MetricsSink* sink : sinks_) sink->on_message(text);
}

void MetricsFanOut::on_step(const StepMetrics& metrics, bool record) {
  for (MetricsSink* sink : sinks_) sink->on_step(metrics, record);
}

void MetricsFanOut::on_eval(const EvalMetrics& metrics) {
  for (MetricsSink* sink : sinks_) sink->on_eval(metrics);
}

}  // namespace gdn
