#include <iomanip>
#include <sstream>
#include <stdexcept>

#include <nlohmann/json.hpp>
#include <sentencepiece_processor.h>

#include <gdn/training/crc32.h>
#include <gdn/training/files.h>
#include <gdn/training/sentencepiece_tokenizer.h>

namespace gdn {
namespace {

/// U+2581, which stands for a space in pieces.
constexpr std::string_view kSpaceSymbol = "\xE2\x96\x81";

void check(const sentencepiece::util::Status& status) {
  if (!status.ok()) throw std::runtime_error("sentencepiece: " + status.ToString());
}

}  // namespace

SentencePieceTokenizer::SentencePieceTokenizer(const std::filesystem::path& model_file)
    : model_(read_text(model_file)),
      processor_(std::make_unique<sentencepiece::SentencePieceProcessor>()) {
  if (!processor_->LoadFromSerializedProto(model_).ok() || processor_->GetPieceSize() == 0) {
    throw std::runtime_error(model_file.string() + ": is no sentencepiece model");
  }
  if (processor_->eos_id() < 0) {
    throw std::runtime_error(model_file.string() +
                             ": has no end-of-sentence piece, which must end documents");
  }
}

SentencePieceTokenizer::~SentencePieceTokenizer() = default;

int64_t SentencePieceTokenizer::vocab_size() const { return processor_->GetPieceSize(); }

int64_t SentencePieceTokenizer::bos_id() const {
  return processor_->bos_id() >= 0 ? processor_->bos_id() : processor_->eos_id();
}

int64_t SentencePieceTokenizer::eos_id() const { return processor_->eos_id(); }

std::vector<int64_t> SentencePieceTokenizer::encode(std::string_view text) const {
  std::vector<int> ids;
  check(processor_->Encode(text, &ids));
  return {ids.begin(), ids.end()};
}

std::string SentencePieceTokenizer::decode(const std::vector<int64_t>& tokens) const {
  std::vector<int> ids;
  for (const int64_t token : tokens) {
    if (token >= 0 && token < vocab_size()) ids.push_back(static_cast<int>(token));
  }
  std::string text;
  check(processor_->Decode(ids, &text));
  return text;
}

std::string SentencePieceTokenizer::token_text(int64_t token) const {
  if (token < 0 || token >= vocab_size()) return {};
  const int id = static_cast<int>(token);
  if (processor_->IsControl(id)) return {};
  if (processor_->IsUnknown(id)) return decode({token});
  if (processor_->IsByte(id)) {  // written as <0x41>
    return {static_cast<char>(std::stoi(processor_->IdToPiece(id).substr(1), nullptr, 16))};
  }
  std::string text;
  for (std::string_view piece = processor_->IdToPiece(id); !piece.empty();) {
    const bool space = piece.starts_with(kSpaceSymbol);
    text += space ? ' ' : piece.front();
    piece.remove_prefix(space ? kSpaceSymbol.size() : 1);
  }
  return text;
}

std::string SentencePieceTokenizer::description() const {
  std::ostringstream text;
  text << "sentencepiece " << std::hex << std::setw(8) << std::setfill('0') << crc32(model_);
  return text.str();
}

void SentencePieceTokenizer::save(const std::filesystem::path& folder) const {
  write_text_atomically(folder / kSentencePieceFile, model_);
  const nlohmann::json json = {{"type", "sentencepiece"}};
  write_text_atomically(folder / kTokenizerFile, json.dump(2) + "\n");
}

}  // namespace gdn
