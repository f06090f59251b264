// A sentencepiece model as a tokenizer.
#pragma once

#include <gdn/training/tokenizer.h>

namespace sentencepiece {
class SentencePieceProcessor;
}

namespace gdn {

/// Name of the model file in a model folder.
inline constexpr char kSentencePieceFile[] = "tokenizer.model";

class SentencePieceTokenizer : public Tokenizer {
 public:
  /// Throws std::runtime_error naming the file when it is no sentencepiece model, or one without an
  /// end-of-sentence piece.
  explicit SentencePieceTokenizer(const std::filesystem::path& model_file);
  ~SentencePieceTokenizer() override;

  int64_t vocab_size() const override;
  /// The model's <s>, or </s> when it has none.
  int64_t bos_id() const override;
  int64_t eos_id() const override;
  std::vector<int64_t> encode(std::string_view text) const override;
  std::string decode(const std::vector<int64_t>& tokens) const override;
  std::string token_text(int64_t token) const override;
  std::string description() const override;
  void save(const std::filesystem::path& folder) const override;

 private:
  std::string model_;  ///< the file's bytes, for save()
  std::unique_ptr<sentencepiece::SentencePieceProcessor> processor_;
};

}  // namespace gdn
