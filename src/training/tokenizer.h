// Tokenizers: from text to token ids and back.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace gdn {

/// Says in a model folder which tokenizer the model was trained with: {"type": "byte"}.
inline constexpr char kTokenizerFile[] = "gdn_tokenizer.json";

class Tokenizer {
 public:
  virtual ~Tokenizer() = default;

  virtual int64_t vocab_size() const = 0;
  /// Stands before each document and before each prompt, so that the first token is predicted too.
  virtual int64_t bos_id() const = 0;
  /// Stands after each document: a stop token in generation.
  virtual int64_t eos_id() const = 0;

  /// Tokens of a text, without bos and eos. Any bytes are allowed.
  virtual std::vector<int64_t> encode(std::string_view text) const = 0;
  /// The text of tokens; bos, eos and other control tokens give nothing.
  virtual std::string decode(const std::vector<int64_t>& tokens) const = 0;
  /// What one token adds to a text that has begun: for streaming. May be part of a UTF-8 character.
  virtual std::string token_text(int64_t token) const = 0;

  /// Two tokenizers with one description give the same tokens: "byte", or "sentencepiece 1f2e3d4c".
  virtual std::string description() const = 0;
  /// Writes kTokenizerFile and what belongs to it into a model folder.
  virtual void save(const std::filesystem::path& folder) const = 0;

  /// bos text
  std::vector<int64_t> encode_prompt(std::string_view text) const;
  /// bos text eos
  std::vector<int64_t> encode_document(std::string_view text) const;
};

/// `name` is "byte" or the path of a sentencepiece model. The byte tokenizer's ids 0 to 255 are the
/// bytes; 256 is both bos and eos. Throws std::runtime_error that names the file.
std::unique_ptr<Tokenizer> make_tokenizer(const std::string& name);

/// The tokenizer of a model folder: kTokenizerFile as Tokenizer::save() wrote it, or else a
/// sentencepiece tokenizer.model. Throws std::runtime_error when the folder has neither.
std::unique_ptr<Tokenizer> load_tokenizer(const std::filesystem::path& folder);

}  // namespace gdn
