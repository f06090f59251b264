// Files that are either wholly written or not there.
#pragma once

#include <cstddef>
#include <filesystem>
#include <string_view>

namespace gdn {

/// Writes `.NAME.tmp` beside the target; commit() makes it the target. A crash at any moment leaves
/// the old file or the new one. Every error is a std::runtime_error that names the target.
class AtomicFile {
 public:
  /// Throws when another process is writing the same target. What a killed one left is reused.
  explicit AtomicFile(std::filesystem::path target);
  /// Without commit(): removes the temporary file.
  ~AtomicFile();
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;

  void write(const void* data, size_t size);
  void write(std::string_view text) { write(text.data(), text.size()); }
  /// Syncs the file, renames it onto the target and syncs the folder.
  void commit();

 private:
  [[noreturn]] void fail(const char* what) const;

  std::filesystem::path target_, temporary_;
  int descriptor_ = -1;
};

/// Makes what was created in, renamed into or removed from a folder last. Throws std::runtime_error
/// that names the folder.
void sync_folder(const std::filesystem::path& folder);

}  // namespace gdn
