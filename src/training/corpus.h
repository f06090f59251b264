// Documents as tokens in memory-mapped files.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace gdn {

class TokenFolder;
class Tokenizer;

/// A sequence of documents, each a range of tokens in a mapped file. Copies share the files.
class Corpus {
 public:
  int64_t documents() const { return static_cast<int64_t>(documents_.size()); }
  int64_t tokens() const { return tokens_; }

  /// Number of tokens of a document.
  int64_t length(int64_t document) const;
  /// Copies the document's tokens `begin` to `end` to `out`.
  void copy(int64_t document, int64_t begin, int64_t end, int64_t* out) const;
  /// Size of the document's text in bytes, where known.
  std::optional<int64_t> bytes(int64_t document) const;
  /// Where it comes from: a path relative to the folder that was named, or FOLDER:INDEX.
  std::string name(int64_t document) const;

  /// Appends all documents of a token folder.
  void add(std::shared_ptr<const TokenFolder> folder);

  /// Training and held-out documents: a document is held out when crc32(name) % 10 == 0. When that
  /// leaves one side without documents, the last tenth of every document is held out.
  std::pair<Corpus, Corpus> split(const Tokenizer& tokenizer) const;

  /// About `limit` tokens of it, by the hash of the names; the last document is cut. 0: all.
  Corpus sample(int64_t limit, const Tokenizer& tokenizer) const;

 private:
  struct Document {
    int32_t folder;
    int32_t reserved;
    int64_t index;
    int64_t begin, end;  ///< in the document's tokens
    int64_t bytes;       ///< -1: unknown
  };
  void append(const Document& document);
  Document cut(const Document& document, int64_t begin, int64_t end,
               const Tokenizer& tokenizer) const;

  std::vector<std::shared_ptr<const TokenFolder>> folders_;
  std::vector<Document> documents_;
  int64_t tokens_ = 0;
};

/// Opens `paths`: token folders as they are; text files, and all files in folders, by tokenizing
/// them into the token folder `cache`, which is reused when it exists. Without a cache they lie in
/// a temporary folder that is gone when the corpus is.
///
/// Throws std::runtime_error that names what is missing, unreadable, empty, or not fit for the
/// tokenizer's vocabulary. `message` hears what takes time.
Corpus open_corpus(const std::vector<std::string>& paths, const Tokenizer& tokenizer,
                   const std::optional<std::filesystem::path>& cache = std::nullopt,
                   const std::function<void(const std::string&)>& message = {});

}  // namespace gdn
