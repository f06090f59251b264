// Files: written with every error reported, replaced atomically, locked.
#pragma once

#include <filesystem>
#include <string>
#include <string_view>

namespace gdn {

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

/// Keeps other processes from working where this one does. The lock goes with its process, however
/// that ends; the file stays.
class FileLock {
 public:
  /// Makes the file where there is none. Throws std::runtime_error, "FILE: BUSY" when another
  /// process holds it.
  FileLock(const std::filesystem::path& file, const std::string& busy);
  ~FileLock();
  FileLock(const FileLock&) = delete;
  FileLock& operator=(const FileLock&) = delete;

 private:
  int descriptor_ = -1;
};

std::string read_text(const std::filesystem::path& file);

/// The file holds the old text or the new one, whatever happens.
void write_text_atomically(const std::filesystem::path& file, std::string_view text);

}  // namespace gdn
