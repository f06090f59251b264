// The safetensors format: a JSON header and raw little-endian tensors.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>

namespace gdn {

/// A file mapped into memory. Tensors share the mapping, which lives as long as any of them.
/// Throws std::runtime_error that names the file and what is wrong: no such file, truncated, header
/// larger than the file or than 100 MB, not JSON, unknown dtype, offsets that overlap, leave gaps,
/// pass the end, or disagree with the shape.
class SafetensorsFile {
 public:
  explicit SafetensorsFile(const std::filesystem::path& file);

  const std::vector<std::string>& names() const { return names_; }
  bool contains(const std::string& name) const { return tensors_.count(name) != 0; }
  /// A read-only view; clone before writing.
  at::Tensor tensor(const std::string& name) const;
  /// Where the tensor's bytes begin, counted from the file's beginning.
  uint64_t offset(const std::string& name) const;
  const std::map<std::string, std::string>& metadata() const { return metadata_; }

 private:
  struct Stored {
    at::Tensor tensor;
    uint64_t offset = 0;
  };
  const Stored& stored(const std::string& name) const;

  std::filesystem::path file_;
  std::vector<std::string> names_;
  std::map<std::string, Stored> tensors_;
  std::map<std::string, std::string> metadata_;
};

/// Writes to a temporary file beside `file`, syncs it and renames it: a crash at any moment leaves
/// the old file or the new one. Throws std::runtime_error that names the file (no space, say); the
/// old file is then untouched and the temporary one removed.
void write_safetensors(const std::filesystem::path& file,
                       const std::vector<std::pair<std::string, at::Tensor>>& tensors,
                       const std::map<std::string, std::string>& metadata = {{"format", "pt"}});

}  // namespace gdn
