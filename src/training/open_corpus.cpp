// From files and folders to token folders.
#include <algorithm>
#include <cstdlib>
#include <stdexcept>

#include <ATen/Parallel.h>
#include <nlohmann/json.hpp>

#include <gdn/models/atomic_file.h>
#include <gdn/models/mapped_file.h>
#include <gdn/training/corpus.h>
#include <gdn/training/crc32.h>
#include <gdn/training/files.h>
#include <gdn/training/token_folder.h>
#include <gdn/training/tokenizer.h>

namespace gdn {
namespace {

namespace fs = std::filesystem;

/// Longer texts are encoded piece by piece, and many pieces at once, which bounds memory.
constexpr size_t kPieceBytes = 1 << 20;
constexpr size_t kBatchBytes = 16 << 20;
constexpr size_t kSniffedBytes = 8192;

/// A text file that becomes a document.
struct Source {
  fs::path file;
  std::string name;
  int64_t bytes;
};

bool wanted(const fs::path& file, const std::vector<std::string>& suffixes) {
  if (suffixes.empty()) {
    const MappedFile mapped(file);
    return mapped.bytes().substr(0, kSniffedBytes).find('\0') == std::string_view::npos;
  }
  const std::string name = file.filename().string();
  return std::any_of(suffixes.begin(), suffixes.end(),
                     [&](const std::string& suffix) { return name.ends_with(suffix); });
}

void list_folder(const fs::path& folder, const std::vector<std::string>& suffixes,
                 std::vector<Source>& sources) {
  const size_t first = sources.size();
  for (auto entry = fs::recursive_directory_iterator(folder); entry != fs::end(entry); ++entry) {
    if (entry->path().filename().string().starts_with('.')) {
      if (entry->is_directory()) entry.disable_recursion_pending();
      continue;
    }
    if (!entry->is_regular_file() || entry->file_size() == 0) continue;
    if (!wanted(entry->path(), suffixes)) continue;
    sources.push_back({entry->path(), entry->path().lexically_relative(folder).generic_string(),
                       static_cast<int64_t>(entry->file_size())});
  }
  if (sources.size() == first) {
    throw std::runtime_error(folder.string() + ": holds no text files" +
                             (suffixes.empty() ? "" : " with the suffixes asked for"));
  }
  std::sort(sources.begin() + static_cast<int64_t>(first), sources.end(),
            [](const Source& a, const Source& b) { return a.name < b.name; });
}

/// What a token folder is made from: equal descriptions, equal tokens.
std::string describe(const std::vector<Source>& sources, const Tokenizer& tokenizer) {
  uint32_t hash = 0;
  int64_t bytes = 0;
  for (const Source& source : sources) {
    const auto time = fs::last_write_time(source.file).time_since_epoch().count();
    hash = crc32(
        source.name + " " + std::to_string(source.bytes) + " " + std::to_string(time) + "\n", hash);
    bytes += source.bytes;
  }
  const nlohmann::json json = {{"tokenizer", tokenizer.description()},
                               {"files", sources.size()},
                               {"bytes", bytes},
                               {"crc32_of_names_sizes_and_times", hash}};
  return json.dump(2) + "\n";
}

/// Encodes pieces of text in parallel and writes them in order.
class Encoder {
 public:
  Encoder(const Tokenizer& tokenizer, TokenFolderWriter& writer)
      : tokenizer_(tokenizer), writer_(writer) {}

  void add(const Source& source) {
    files_.push_back(std::make_unique<MappedFile>(source.file));
    std::string_view rest = files_.back()->bytes();
    for (bool first = true; first || !rest.empty(); first = false) {
      std::string_view text = rest.substr(0, kPieceBytes);
      if (text.size() < rest.size()) {
        const size_t line_end = text.rfind('\n');
        if (line_end != std::string_view::npos) text = text.substr(0, line_end + 1);
      }
      rest.remove_prefix(text.size());
      pieces_.push_back({text, &source, first, rest.empty(), {}});
      pending_bytes_ += text.size();
      if (pending_bytes_ >= kBatchBytes) flush();
    }
  }

  void flush() {
    at::parallel_for(0, static_cast<int64_t>(pieces_.size()), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) pieces_[i].tokens = tokenizer_.encode(pieces_[i].text);
    });
    for (const Piece& piece : pieces_) {
      if (piece.first) writer_.append({tokenizer_.bos_id()});
      writer_.append(piece.tokens);
      if (!piece.last) continue;
      writer_.append({tokenizer_.eos_id()});
      writer_.end_document(piece.source->name, piece.source->bytes);
    }
    // The file that add() is cutting up stays mapped.
    if (files_.size() > 1) files_.erase(files_.begin(), files_.end() - 1);
    pieces_.clear();
    pending_bytes_ = 0;
  }

 private:
  struct Piece {
    std::string_view text;
    const Source* source;
    bool first, last;  ///< of its document
    std::vector<int64_t> tokens;
  };

  const Tokenizer& tokenizer_;
  TokenFolderWriter& writer_;
  std::vector<std::unique_ptr<MappedFile>> files_;
  std::vector<Piece> pieces_;
  size_t pending_bytes_ = 0;
};

/// Writes the token folder under another name first, so that `folder` is complete when it is there.
void tokenize(const std::vector<Source>& sources, const Tokenizer& tokenizer,
              const fs::path& folder, const std::string& description) {
  fs::path temporary = folder;
  temporary += ".tmp";
  fs::remove_all(temporary);
  try {
    TokenFolderWriter writer(temporary, tokenizer.vocab_size());
    Encoder encoder(tokenizer, writer);
    for (const Source& source : sources) encoder.add(source);
    encoder.flush();
    writer.close(description);
    fs::remove_all(folder);
    fs::rename(temporary, folder);
    sync_folder(folder.parent_path());
  } catch (...) {
    std::error_code ignored;
    fs::remove_all(temporary, ignored);
    throw;
  }
}

/// A folder that is removed again; what was mapped from it stays mapped.
class TemporaryFolder {
 public:
  TemporaryFolder() {
    std::string pattern = (fs::temp_directory_path() / "gdn-tokens-XXXXXX").string();
    if (::mkdtemp(pattern.data()) == nullptr) {
      throw std::runtime_error(pattern + ": cannot be made");
    }
    path_ = pattern;
  }
  ~TemporaryFolder() {
    std::error_code ignored;
    fs::remove_all(path_, ignored);
  }
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;

  const fs::path& path() const { return path_; }

 private:
  fs::path path_;
};

std::shared_ptr<const TokenFolder> tokenized(const std::vector<Source>& sources,
                                             const Tokenizer& tokenizer,
                                             const CorpusOptions& options) {
  const std::string description = describe(sources, tokenizer);
  if (options.cache && fs::exists(*options.cache)) {
    const fs::path record = *options.cache / kTokensRecord;
    if (!fs::exists(record)) {
      throw std::runtime_error(options.cache->string() + ": is in the way of token files (has no " +
                               kTokensRecord + ")");
    }
    if (read_text(record) == description) {
      return std::make_shared<TokenFolder>(*options.cache, tokenizer.vocab_size());
    }
    if (options.keep_cache) {
      throw std::runtime_error(
          options.cache->string() +
          ": was made from other files, or by another tokenizer; name it as the "
          "data to go on with its tokens");
    }
  }
  if (options.message) {
    options.message("tokenizing " + std::to_string(sources.size()) + " files");
  }
  std::optional<TemporaryFolder> temporary;
  if (!options.cache) temporary.emplace();
  const fs::path folder = options.cache ? *options.cache : temporary->path() / "tokens";
  if (folder.has_parent_path()) fs::create_directories(folder.parent_path());
  tokenize(sources, tokenizer, folder, description);
  return std::make_shared<TokenFolder>(folder, tokenizer.vocab_size());
}

}  // namespace

Corpus open_corpus(const std::vector<std::string>& paths, const Tokenizer& tokenizer,
                   const CorpusOptions& options) {
  Corpus corpus;
  std::vector<Source> sources;
  for (const std::string& path : paths) {
    if (!fs::exists(path)) throw std::runtime_error(path + ": does not exist");
    if (is_token_folder(path)) {
      corpus.add(std::make_shared<TokenFolder>(path, tokenizer.vocab_size()));
    } else if (fs::is_directory(path)) {
      list_folder(path, options.suffixes, sources);
    } else {
      const fs::path file(path);
      const auto bytes = static_cast<int64_t>(MappedFile(file).bytes().size());
      if (bytes == 0) throw std::runtime_error(path + ": is empty");
      sources.push_back({file, file.filename().string(), bytes});
    }
  }
  if (!sources.empty()) corpus.add(tokenized(sources, tokenizer, options));
  if (corpus.tokens() == 0) throw std::runtime_error("no data: none of the documents holds tokens");
  return corpus;
}

}  // namespace gdn
