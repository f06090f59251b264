#include <stdexcept>

#include <nlohmann/json.hpp>

#include <gdn/training/files.h>
#include <gdn/training/sentencepiece_tokenizer.h>
#include <gdn/training/tokenizer.h>

namespace gdn {
namespace {

/// Ids 0 to 255 are the bytes; 256 begins and ends documents.
class ByteTokenizer : public Tokenizer {
 public:
  int64_t vocab_size() const override { return 257; }
  int64_t bos_id() const override { return 256; }
  int64_t eos_id() const override { return 256; }

  std::vector<int64_t> encode(std::string_view text) const override {
    const auto* bytes = reinterpret_cast<const unsigned char*>(text.data());
    return {bytes, bytes + text.size()};
  }

  std::string decode(const std::vector<int64_t>& tokens) const override {
    std::string text;
    for (const int64_t token : tokens) text += token_text(token);
    return text;
  }

  std::string token_text(int64_t token) const override {
    return token >= 0 && token < 256 ? std::string(1, static_cast<char>(token)) : std::string();
  }

  std::string description() const override { return "byte"; }

  void save(const std::filesystem::path& folder) const override {
    const nlohmann::json json = {{"type", "byte"}};
    write_text_atomically(folder / kTokenizerFile, json.dump(2) + "\n");
  }
};

}  // namespace

std::vector<int64_t> Tokenizer::encode_prompt(std::string_view text) const {
  std::vector<int64_t> tokens = encode(text);
  tokens.insert(tokens.begin(), bos_id());
  return tokens;
}

std::vector<int64_t> Tokenizer::encode_document(std::string_view text) const {
  std::vector<int64_t> tokens = encode_prompt(text);
  tokens.push_back(eos_id());
  return tokens;
}

std::unique_ptr<Tokenizer> make_tokenizer(const std::string& name) {
  if (name == "byte") return std::make_unique<ByteTokenizer>();
  if (!std::filesystem::exists(name)) {
    throw std::runtime_error("tokenizer must be 'byte' or a sentencepiece model file, got '" +
                             name + "', which does not exist");
  }
  return std::make_unique<SentencePieceTokenizer>(name);
}

std::unique_ptr<Tokenizer> load_tokenizer(const std::filesystem::path& folder) {
  const std::filesystem::path file = folder / kTokenizerFile;
  if (!std::filesystem::exists(file)) {
    if (std::filesystem::exists(folder / kSentencePieceFile)) {
      return std::make_unique<SentencePieceTokenizer>(folder / kSentencePieceFile);
    }
    throw std::runtime_error(folder.string() + ": has neither " + kTokenizerFile + " nor " +
                             kSentencePieceFile);
  }
  std::string type;
  try {
    type = nlohmann::json::parse(read_text(file)).at("type").get<std::string>();
  } catch (const nlohmann::json::exception& error) {
    throw std::runtime_error(file.string() + ": no tokenizer description: " + error.what());
  }
  if (type == "byte") return std::make_unique<ByteTokenizer>();
  if (type == "sentencepiece") {
    return std::make_unique<SentencePieceTokenizer>(folder / kSentencePieceFile);
  }
  throw std::runtime_error(file.string() + ": type must be byte or sentencepiece, got '" + type +
                           "'");
}

}  // namespace gdn
