// The format of tokenized data: a folder of NumPy arrays, which anybody can write.
//
//   tokens.npy      [tokens] integers: the tokens of all documents, one document after another
//   documents.npy   [N + 1] integers: document n is tokens[documents[n]:documents[n + 1]]
//   bytes.npy       [N] integers, optional: size of each document's text, for bits per byte
//   names.txt       N lines, optional: where each document comes from
//   tokens.json     of our own writing: what the folder was made from
//
// Documents should begin and end with the tokenizer's bos and eos; nothing is added to them.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include <gdn/training/npy.h>

namespace gdn {

/// What a token folder of our own writing was made from.
inline constexpr char kTokensRecord[] = "tokens.json";

bool is_token_folder(const std::filesystem::path& folder);

class TokenFolder {
 public:
  /// Throws std::runtime_error naming the file that is missing or does not fit. Tokens are checked
  /// against the vocabulary as they are read.
  TokenFolder(const std::filesystem::path& folder, int64_t vocab_size);

  int64_t documents() const { return starts_.size() - 1; }
  int64_t length(int64_t document) const { return starts_[document + 1] - starts_[document]; }
  std::optional<int64_t> bytes(int64_t document) const;
  std::string name(int64_t document) const;
  void copy(int64_t document, int64_t begin, int64_t end, int64_t* out) const;

 private:
  std::filesystem::path folder_;
  int64_t vocab_size_;
  NpyArray tokens_;
  NpyArray starts_;
  std::optional<NpyArray> bytes_;
  std::optional<MappedFile> names_;
  std::vector<size_t> name_starts_;
};

class TokenFolderWriter {
 public:
  /// Makes the folder, which must not exist.
  TokenFolderWriter(const std::filesystem::path& folder, int64_t vocab_size);

  /// Appends tokens to the document that is being written.
  void append(const std::vector<int64_t>& tokens);
  void end_document(const std::string& name, int64_t bytes);
  /// Completes every file; `description` becomes kTokensRecord.
  void close(const std::string& description);

 private:
  std::filesystem::path folder_;
  NpyWriter tokens_, starts_, bytes_;
  OutputFile names_;
  int64_t position_ = 0;
};

}  // namespace gdn
