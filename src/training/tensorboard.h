// TensorBoard's event files: TFRecord frames around hand-encoded Event messages.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

#include <gdn/training/files.h>

namespace gdn {

struct Scalar {
  std::string_view tag;
  double value;
};

class TensorBoardWriter {
 public:
  /// Begins a new file events.out.tfevents.* in `folder`.
  explicit TensorBoardWriter(const std::filesystem::path& folder);

  /// Written through to the file at once.
  void write(int64_t step, const std::vector<Scalar>& scalars);

 private:
  void write_record(std::string_view event);

  OutputFile file_;
};

}  // namespace gdn
