// One-dimensional integer arrays in NumPy's .npy format.
#pragma once

#include <cstdint>
#include <filesystem>

#include <gdn/models/mapped_file.h>
#include <gdn/training/files.h>

namespace gdn {

/// A mapped array of unsigned or non-negative signed integers of 1, 2, 4 or 8 bytes, little-endian.
class NpyArray {
 public:
  /// Throws std::runtime_error naming the file and what is wrong with it.
  explicit NpyArray(const std::filesystem::path& file);

  int64_t size() const { return size_; }
  int64_t operator[](int64_t index) const;
  void copy(int64_t begin, int64_t end, int64_t* out) const;

 private:
  MappedFile file_;
  const char* data_ = nullptr;
  int64_t item_bytes_ = 0;
  int64_t size_ = 0;
};

/// Writes an array whose length is not known before its end.
class NpyWriter {
 public:
  /// item_bytes 2 or 4: uint16 or uint32; 8: int64.
  NpyWriter(const std::filesystem::path& file, int64_t item_bytes);

  void append(const int64_t* values, int64_t count);
  /// Completes the file and syncs it.
  void close();

 private:
  std::string header() const;

  OutputFile file_;
  int64_t item_bytes_;
  int64_t size_ = 0;
};

}  // namespace gdn
