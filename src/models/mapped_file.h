// A file in memory: read as it is touched, so that it may be larger than memory.
#pragma once

#include <cstddef>
#include <filesystem>
#include <string_view>

namespace gdn {

/// A whole regular file, read-only. Throws std::runtime_error that names the file and the reason.
class MappedFile {
 public:
  explicit MappedFile(const std::filesystem::path& file);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  std::string_view bytes() const { return {data_, size_}; }

 private:
  char* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace gdn
