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
    int64_t folder;
    int64_t index;       ///< in the folder
    int64_t begin, end;  ///< of the folder's document
    int64_t bytes;       ///< -1: unknown
  };
  Corpus without_documents() const;
  void append(const Document& document);
  void append_cut(Document document, int64_t begin, int64_t end, const Tokenizer& tokenizer);

  std::vector<std::shared_ptr<const TokenFolder>> folders_;
  std::vector<Document> documents_;
  int64_t tokens_ = 0;
};

struct CorpusOptions {
  /// Files in folders are taken when their names end with one of these. Empty: all files without a
  /// zero byte in their first 8 KB. Hidden files and folders are never taken.
  std::vector<std::string> suffixes = {};
  /// Token folder to make from the text, or to reuse when it was made from the same files. Without
  /// it the tokens lie in a temporary folder that is gone when the corpus is.
  std::optional<std::filesystem::path> cache = std::nullopt;
  /// A cache that was made from other files is an error, and not made again.
  bool keep_cache = false;
  /// Hears what takes time.
  std::function<void(const std::string&)> message = {};
};

/// Opens `paths`: folders of token files as they are (see token_folder.h), other files and folders
/// as text, each file a document of bos, text, eos.
///
/// Throws std::runtime_error that names what is missing, unreadable or empty, a cache that is to be
/// kept and does not fit, and a folder in the cache's place that is no cache.
Corpus open_corpus(const std::vector<std::string>& paths, const Tokenizer& tokenizer,
                   const CorpusOptions& options = {});

}  // namespace gdn
