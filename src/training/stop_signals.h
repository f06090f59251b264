// Ctrl-C and SIGTERM as a polite request to stop.
#pragma once

namespace gdn {

/// While one exists, the first SIGINT or SIGTERM only makes requested() true, and the second ends
/// the process at once, as the signal does by default. At most one exists at a time.
class StopSignals {
 public:
  StopSignals();
  ~StopSignals();
  StopSignals(const StopSignals&) = delete;
  StopSignals& operator=(const StopSignals&) = delete;

  bool requested() const;
};

}  // namespace gdn
