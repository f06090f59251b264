#include <algorithm>
#include <stdexcept>

#include <gdn/training/corpus.h>
#include <gdn/training/crc32.h>
#include <gdn/training/token_folder.h>
#include <gdn/training/tokenizer.h>

namespace gdn {

int64_t Corpus::length(int64_t document) const {
  return documents_[document].end - documents_[document].begin;
}

void Corpus::copy(int64_t document, int64_t begin, int64_t end, int64_t* out) const {
  const Document& d = documents_[document];
  folders_[d.folder]->copy(d.index, d.begin + begin, d.begin + end, out);
}

std::optional<int64_t> Corpus::bytes(int64_t document) const {
  const int64_t bytes = documents_[document].bytes;
  return bytes < 0 ? std::nullopt : std::optional(bytes);
}

std::string Corpus::name(int64_t document) const {
  const Document& d = documents_[document];
  return folders_[d.folder]->name(d.index);
}

void Corpus::add(std::shared_ptr<const TokenFolder> folder) {
  const auto position = static_cast<int64_t>(folders_.size());
  for (int64_t n = 0; n < folder->documents(); ++n) {
    append({position, n, 0, folder->length(n), folder->bytes(n).value_or(-1)});
  }
  folders_.push_back(std::move(folder));
}

std::pair<Corpus, Corpus> Corpus::split(const Tokenizer& tokenizer) const {
  std::pair<Corpus, Corpus> parts(without_documents(), without_documents());
  auto& [training, held_out] = parts;
  for (int64_t n = 0; n < documents(); ++n) {
    (crc32(name(n)) % 10 == 0 ? held_out : training).append(documents_[n]);
  }
  if (training.documents() > 0 && held_out.documents() > 0) return parts;

  parts = {without_documents(), without_documents()};
  for (int64_t n = 0; n < documents(); ++n) {
    const int64_t cut = length(n) - length(n) / 10;
    training.append_cut(documents_[n], 0, cut, tokenizer);
    held_out.append_cut(documents_[n], cut, length(n), tokenizer);
  }
  return parts;
}

Corpus Corpus::sample(int64_t limit, const Tokenizer& tokenizer) const {
  if (limit <= 0 || tokens() <= limit) return *this;
  std::vector<std::pair<uint32_t, int64_t>> order(documents());
  for (int64_t n = 0; n < documents(); ++n) order[n] = {crc32(name(n)), n};
  std::sort(order.begin(), order.end());
  Corpus part = without_documents();
  for (const auto& [hash, n] : order) {
    if (part.tokens() >= limit) break;
    part.append_cut(documents_[n], 0, std::min(length(n), limit - part.tokens()), tokenizer);
  }
  return part;
}

Corpus Corpus::without_documents() const {
  Corpus corpus;
  corpus.folders_ = folders_;
  return corpus;
}

void Corpus::append(const Document& document) {
  documents_.push_back(document);
  tokens_ += document.end - document.begin;
}

void Corpus::append_cut(Document document, int64_t begin, int64_t end, const Tokenizer& tokenizer) {
  if (begin == end) return;
  if (end - begin < document.end - document.begin) {
    document.end = document.begin + end;
    document.begin += begin;
    std::vector<int64_t> tokens(end - begin);
    folders_[document.folder]->copy(document.index, document.begin, document.end, tokens.data());
    document.bytes = static_cast<int64_t>(tokenizer.decode(tokens).size());
  }
  append(document);
}

}  // namespace gdn
