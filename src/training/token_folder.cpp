#include <algorithm>
#include <stdexcept>

#include <gdn/training/token_folder.h>

namespace gdn {
namespace {

constexpr char kTokens[] = "tokens.npy";
constexpr char kDocuments[] = "documents.npy";
constexpr char kBytes[] = "bytes.npy";
constexpr char kNames[] = "names.txt";

const std::filesystem::path& make_folder(const std::filesystem::path& folder) {
  std::filesystem::create_directory(folder);
  return folder;
}

}  // namespace

bool is_token_folder(const std::filesystem::path& folder) {
  return std::filesystem::exists(folder / kTokens);
}

TokenFolder::TokenFolder(const std::filesystem::path& folder, int64_t vocab_size)
    : folder_(folder),
      vocab_size_(vocab_size),
      tokens_(folder / kTokens),
      starts_(folder / kDocuments) {
  const auto reject = [&](const char* file, const std::string& what) {
    throw std::runtime_error((folder_ / file).string() + ": " + what);
  };
  bool sorted = starts_.size() > 0 && starts_[0] == 0;
  for (int64_t n = 0; sorted && n < documents(); ++n) sorted = length(n) >= 0;
  if (!sorted || starts_[documents()] != tokens_.size()) {
    reject(kDocuments,
           "must rise from 0 to the number of tokens, " + std::to_string(tokens_.size()));
  }
  if (std::filesystem::exists(folder / kBytes)) {
    bytes_.emplace(folder / kBytes);
    if (bytes_->size() != documents()) {
      reject(kBytes, "must hold " + std::to_string(documents()) +
                         " sizes, one a document, but holds " + std::to_string(bytes_->size()));
    }
  }
  if (std::filesystem::exists(folder / kNames)) {
    names_.emplace(folder / kNames);
    const std::string_view text = names_->bytes();
    name_starts_.push_back(0);
    for (size_t end; (end = text.find('\n', name_starts_.back())) != std::string_view::npos;) {
      name_starts_.push_back(end + 1);
    }
    if (static_cast<int64_t>(name_starts_.size()) != documents() + 1) {
      reject(kNames, "must hold " + std::to_string(documents()) +
                         " lines, one a document, but holds " +
                         std::to_string(name_starts_.size() - 1));
    }
  }
}

std::optional<int64_t> TokenFolder::bytes(int64_t document) const {
  if (!bytes_) return std::nullopt;
  return (*bytes_)[document];
}

std::string TokenFolder::name(int64_t document) const {
  if (!names_) return folder_.filename().string() + ":" + std::to_string(document);
  const size_t begin = name_starts_[document];
  return std::string(names_->bytes().substr(begin, name_starts_[document + 1] - 1 - begin));
}

void TokenFolder::copy(int64_t document, int64_t begin, int64_t end, int64_t* out) const {
  const int64_t start = starts_[document];
  tokens_.copy(start + begin, start + end, out);
  for (int64_t i = 0; i < end - begin; ++i) {
    if (out[i] < 0 || out[i] >= vocab_size_) {
      throw std::runtime_error((folder_ / kTokens).string() + ": token " +
                               std::to_string(start + begin + i) + " is " + std::to_string(out[i]) +
                               ", outside of the tokenizer's vocabulary of " +
                               std::to_string(vocab_size_));
    }
  }
}

TokenFolderWriter::TokenFolderWriter(const std::filesystem::path& folder, int64_t vocab_size)
    : folder_(make_folder(folder)),
      tokens_(folder / kTokens, vocab_size <= (1 << 16) ? 2 : 4),
      starts_(folder / kDocuments, 8),
      bytes_(folder / kBytes, 8),
      names_(folder / kNames) {
  starts_.append(&position_, 1);
}

void TokenFolderWriter::append(const std::vector<int64_t>& tokens) {
  tokens_.append(tokens.data(), static_cast<int64_t>(tokens.size()));
  position_ += static_cast<int64_t>(tokens.size());
}

void TokenFolderWriter::end_document(const std::string& name, int64_t bytes) {
  starts_.append(&position_, 1);
  bytes_.append(&bytes, 1);
  std::string line = name;
  std::replace(line.begin(), line.end(), '\n', ' ');
  names_.write(line + "\n");
}

void TokenFolderWriter::close(const std::string& description) {
  tokens_.close();
  starts_.close();
  bytes_.close();
  names_.close();
  write_text_atomically(folder_ / kTokensRecord, description);
}

}  // namespace gdn
