#include <numeric>

#include <sentencepiece_trainer.h>

#include <gdn/training/tokenizer.h>

#include "support.h"

namespace gdn {
namespace {

using testing::TestFolder;

TEST(ByteTokenizer, GivesEveryByteBack) {
  const auto tokenizer = make_tokenizer("byte");
  std::string text(512, '\0');
  std::iota(text.begin(), text.end(), '\0');  // all bytes, most of which are no UTF-8
  const auto tokens = tokenizer->encode(text);
  EXPECT_EQ(tokens.size(), text.size());
  EXPECT_EQ(tokens[200], 200);
  EXPECT_EQ(tokenizer->decode(tokens), text);
}

TEST(ByteTokenizer, SetsDocumentsApart) {
  const auto tokenizer = make_tokenizer("byte");
  EXPECT_EQ(tokenizer->vocab_size(), 257);
  EXPECT_EQ(tokenizer->encode_prompt("ab"), (std::vector<int64_t>{256, 'a', 'b'}));
  EXPECT_EQ(tokenizer->encode_document("ab"), (std::vector<int64_t>{256, 'a', 'b', 256}));
  EXPECT_EQ(tokenizer->decode({256, 'a', 256, -1, 257}), "a");
}

TEST(ByteTokenizer, IsFoundInAModelFolder) {
  const TestFolder folder;
  make_tokenizer("byte")->save(folder / "");
  EXPECT_EQ(load_tokenizer(folder / "")->description(), "byte");
}

/// Trains a sentencepiece model inside this process, where libtorch's protobuf is loaded as well.
std::string train_sentencepiece(const TestFolder& folder, const std::string& more_flags) {
  std::string text;
  for (unsigned i = 0; i < 200; ++i) text += testing::some_text(80, i) + "\n";
  const std::string input = folder.write("text.txt", text);
  const std::string prefix = (folder / "spm").string();
  const auto status = sentencepiece::SentencePieceTrainer::Train(
      "--input=" + input + " --model_prefix=" + prefix + " --minloglevel=2 " + more_flags);
  EXPECT_TRUE(status.ok()) << status.ToString();
  return prefix + ".model";
}

constexpr char kWithBytes[] =
    "--vocab_size=310 --byte_fallback=true --model_type=bpe --hard_vocab_limit=false "
    "--normalization_rule_name=identity --remove_extra_whitespaces=false "
    "--split_by_whitespace=false";  // pieces of several words

TEST(SentencePieceTokenizer, GivesTextBack) {
  const TestFolder folder;
  const auto tokenizer = make_tokenizer(train_sentencepiece(folder, kWithBytes));
  EXPECT_GT(tokenizer->vocab_size(), 260);
  for (const std::string text : {"the delta rule", "  two  spaces ", "naïve ☃ \n\t", ""}) {
    const auto tokens = tokenizer->encode(text);
    EXPECT_EQ(tokenizer->decode(tokens), text);
    std::string streamed;
    for (const int64_t token : tokens) streamed += tokenizer->token_text(token);
    // Sentencepiece puts a space before a text, which decoding takes away again.
    EXPECT_EQ(streamed, text.empty() ? "" : " " + text);
  }
  EXPECT_LT(tokenizer->encode("the delta rule").size(), 14U);
  EXPECT_EQ(tokenizer->token_text(tokenizer->bos_id()), "");
  EXPECT_EQ(tokenizer->token_text(tokenizer->eos_id()), "");
}

TEST(SentencePieceTokenizer, LivesInAModelFolder) {
  const TestFolder folder;
  const auto tokenizer = make_tokenizer(train_sentencepiece(folder, kWithBytes));
  tokenizer->save(folder / "");
  const auto loaded = load_tokenizer(folder / "");
  EXPECT_EQ(loaded->description(), tokenizer->description());
  EXPECT_EQ(loaded->encode("a state decays"), tokenizer->encode("a state decays"));
  const auto smaller = make_tokenizer(
      train_sentencepiece(folder, std::string(kWithBytes).replace(0, 16, "--vocab_size=300")));
  EXPECT_NE(smaller->description(), tokenizer->description());
  std::filesystem::remove(folder / kTokenizerFile);  // as in folders of transformers
  EXPECT_EQ(load_tokenizer(folder / "")->description(), tokenizer->description());
}

TEST(SentencePieceTokenizer, BeginsWithEosWithoutBos) {
  const TestFolder folder;
  const auto tokenizer =
      make_tokenizer(train_sentencepiece(folder, std::string(kWithBytes) + " --bos_id=-1"));
  EXPECT_EQ(tokenizer->bos_id(), tokenizer->eos_id());
}

TEST(Tokenizer, NamesWhatIsWrong) {
  const TestFolder folder;
  const auto message = [](auto action) { return testing::message_of<std::runtime_error>(action); };
  EXPECT_NE(message([] { make_tokenizer("no-such.model"); }).find("no-such.model"),
            std::string::npos);
  const std::string file = folder.write("bad.model", "not a model");
  EXPECT_NE(message([&] { make_tokenizer(file); }).find(file), std::string::npos);
  EXPECT_NE(message([&] { load_tokenizer(folder / ""); }).find(kTokenizerFile), std::string::npos);
  folder.write(kTokenizerFile, R"({"type": "words"})");
  EXPECT_NE(message([&] { load_tokenizer(folder / ""); }).find("words"), std::string::npos);
}

}  // namespace
}  // namespace gdn
