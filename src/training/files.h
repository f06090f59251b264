// Files: mapped into memory, written with every error reported, replaced atomically.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

namespace gdn {

/// A whole file, read-only, in memory as needed. Throws std::runtime_error naming the file.
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

/// A new file, written in order. Every method throws std::runtime_error naming the file.
class OutputFile {
 public:
  enum class Mode { create, append };

  explicit OutputFile(const std::filesystem::path& file, Mode mode = Mode::create);
  ~OutputFile();
  OutputFile(const OutputFile&) = delete;
  OutputFile& operator=(const OutputFile&) = delete;

  void write(std::string_view bytes);
  void flush();
  /// Overwrites the first bytes of the file.
  void rewrite_start(std::string_view bytes);
  /// Flushes, syncs to the disk and closes.
  void close();

 private:
  [[noreturn]] void fail(const char* what) const;

  std::filesystem::path file_;
  int descriptor_ = -1;
  std::string buffer_;
};

std::string read_text(const std::filesystem::path& file);

/// The file holds the old text or the new one, whatever happens.
void write_text_atomically(const std::filesystem::path& file, std::string_view text);

/// Makes what was created in, renamed into or removed from a folder last.
void sync_folder(const std::filesystem::path& folder);

}  // namespace gdn
