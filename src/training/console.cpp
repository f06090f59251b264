#include <algorithm>
#include <cmath>
#include <sys/ioctl.h>
#include <unistd.h>

#include <gdn/training/console.h>

namespace gdn {
namespace {

template <typename... Values>
std::string format(const char* pattern, Values... values) {
  char text[512];
  std::snprintf(text, sizeof(text), pattern, values...);
  return text;
}

int columns(std::FILE* out) {
  winsize size{};
  const bool known = ::ioctl(::fileno(out), TIOCGWINSZ, &size) == 0 && size.ws_col > 0;
  return known ? size.ws_col : 80;
}

std::string summary(const StepMetrics& metrics) {
  return format("loss %.4f  lr %.2e  grad %.2f  %s tok/s  %.1f GB  eta %s", metrics.loss,
                metrics.lr, metrics.grad_norm, human_count(metrics.tokens_per_second).c_str(),
                static_cast<double>(metrics.memory_bytes) / 1e9,
                human_duration(metrics.eta_seconds).c_str());
}

}  // namespace

std::string human_count(double count) {
  const char* unit = "";
  for (const char* next : {"k", "M", "B", "T"}) {
    if (count < 999.5) break;
    count /= 1000;
    unit = next;
  }
  return format(*unit == '\0' ? "%.0f%s" : count < 99.95 ? "%.1f%s" : "%.0f%s", count, unit);
}

std::string human_duration(double seconds) {
  const auto whole = static_cast<long>(std::llround(std::max(seconds, 0.0)));
  if (whole >= 3600) return format("%ldh%02ldm", whole / 3600, whole / 60 % 60);
  if (whole >= 60) return format("%ldm%02lds", whole / 60, whole % 60);
  return format("%lds", whole);
}

ConsoleProgress::ConsoleProgress(std::FILE* out)
    : out_(out), terminal_(::isatty(::fileno(out)) == 1) {}

ConsoleProgress::~ConsoleProgress() { clear_bar(); }

void ConsoleProgress::on_message(std::string_view text) { print_line(std::string(text)); }

void ConsoleProgress::on_step(const StepMetrics& metrics, bool record) {
  if (record && !terminal_) {
    print_line(format("step %ld/%ld  ", static_cast<long>(metrics.step),
                      static_cast<long>(metrics.steps)) +
               summary(metrics));
  }
  if (terminal_) draw_bar(metrics);
}

void ConsoleProgress::on_eval(const EvalMetrics& metrics) {
  std::string line =
      format("step %ld  held-out loss %.4f  perplexity %.3f", static_cast<long>(metrics.step),
             metrics.result.loss, metrics.result.perplexity);
  if (metrics.result.bits_per_byte) {
    line += format("  bits per byte %.4f", *metrics.result.bits_per_byte);
  }
  print_line(line);
}

void ConsoleProgress::print_line(const std::string& line) {
  clear_bar();
  std::fprintf(out_, "%s\n", line.c_str());
  std::fflush(out_);
}

void ConsoleProgress::draw_bar(const StepMetrics& metrics) {
  const std::string text =
      format(" %ld/%ld  ", static_cast<long>(metrics.step), static_cast<long>(metrics.steps)) +
      summary(metrics);
  const int width = std::clamp(columns(out_) - static_cast<int>(text.size()) - 3, 0, 30);
  const auto done = static_cast<int>(width * metrics.step / std::max<int64_t>(metrics.steps, 1));
  std::string bar(width, ' ');
  std::fill_n(bar.begin(), done, '=');
  std::fprintf(out_, "\r\x1b[K[%s]%.*s", bar.c_str(), columns(out_) - width - 3, text.c_str());
  std::fflush(out_);
  bar_shown_ = true;
}

void ConsoleProgress::clear_bar() {
  if (!bar_shown_) return;
  std::fputs("\r\x1b[K", out_);
  bar_shown_ = false;
}

}  // namespace gdn
