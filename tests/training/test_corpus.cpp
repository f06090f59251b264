#include <chrono>

#include <gdn/training/corpus.h>
#include <gdn/training/crc32.h>
#include <gdn/training/files.h>
#include <gdn/training/token_folder.h>
#include <gdn/training/tokenizer.h>

#include "support.h"

namespace gdn {
namespace {

using testing::message_of;
using testing::TestFolder;

std::vector<int64_t> tokens_of(const Corpus& corpus, int64_t document) {
  std::vector<int64_t> tokens(corpus.length(document));
  corpus.copy(document, 0, corpus.length(document), tokens.data());
  return tokens;
}

/// Bytes under another description.
class OtherBytes : public Tokenizer {
 public:
  int64_t vocab_size() const override { return bytes_->vocab_size(); }
  int64_t bos_id() const override { return bytes_->bos_id(); }
  int64_t eos_id() const override { return bytes_->eos_id(); }
  std::vector<int64_t> encode(std::string_view text) const override { return bytes_->encode(text); }
  std::string decode(const std::vector<int64_t>& tokens) const override {
    return bytes_->decode(tokens);
  }
  std::string token_text(int64_t token) const override { return bytes_->token_text(token); }
  std::string description() const override { return "other"; }
  void save(const std::filesystem::path& folder) const override { bytes_->save(folder); }

 private:
  std::unique_ptr<Tokenizer> bytes_ = make_tokenizer("byte");
};

class CorpusTest : public ::testing::Test {
 protected:
  Corpus open(const std::vector<std::string>& paths, const CorpusOptions& options = {}) const {
    return open_corpus(paths, *tokenizer, options);
  }
  std::string error(const std::vector<std::string>& paths,
                    const CorpusOptions& options = {}) const {
    return message_of<std::runtime_error>([&] { open(paths, options); });
  }

  TestFolder folder;
  std::unique_ptr<Tokenizer> tokenizer = make_tokenizer("byte");
};

TEST_F(CorpusTest, MakesADocumentOfEachFile) {
  folder.write("text/b.txt", "beta");
  folder.write("text/sub/a.txt", "\xFF\xFE");  // no UTF-8
  folder.write("text/empty.txt", "");
  folder.write("text/.hidden", "hidden");
  folder.write("text/.git/config", "hidden");
  folder.write("text/binary.bin", std::string("a\0b", 3));
  const std::string file = folder.write("single.bin", std::string("a\0b", 3));
  const Corpus corpus = open({(folder / "text").string(), file});
  ASSERT_EQ(corpus.documents(), 3);
  EXPECT_EQ(corpus.name(0), "b.txt");
  EXPECT_EQ(corpus.name(1), "sub/a.txt");
  EXPECT_EQ(corpus.name(2), "single.bin");
  EXPECT_EQ(tokens_of(corpus, 0), tokenizer->encode_document("beta"));
  EXPECT_EQ(tokens_of(corpus, 1), (std::vector<int64_t>{256, 0xFF, 0xFE, 256}));
  EXPECT_EQ(tokens_of(corpus, 2), (std::vector<int64_t>{256, 'a', 0, 'b', 256}));
  EXPECT_EQ(corpus.bytes(0), 4);
  EXPECT_EQ(corpus.tokens(), 6 + 4 + 5);
}

TEST_F(CorpusTest, KeepsNamesOnALineEach) {
  const Corpus corpus = open({folder.write("a\nb", "text"), folder.write("c", "text")});
  ASSERT_EQ(corpus.documents(), 2);
  EXPECT_EQ(corpus.name(0), "a b");
  EXPECT_EQ(corpus.name(1), "c");
}

TEST_F(CorpusTest, TakesSuffixesFromFolders) {
  folder.write("text/a.py", "py");
  folder.write("text/a.txt", "txt");
  const Corpus corpus = open({(folder / "text").string()}, {.suffixes = {".py"}});
  ASSERT_EQ(corpus.documents(), 1);
  EXPECT_EQ(corpus.name(0), "a.py");
}

TEST_F(CorpusTest, PutsLongDocumentsTogetherFromPieces) {
  const std::string part = testing::some_text(1'000'000, 1);
  std::string text;
  for (int i = 0; i < 15; ++i) text += part;  // more than is encoded at a time
  text += std::string(3'000'000, 'x');        // longer than a piece, and without a line's end
  folder.write("text/before.txt", "before");
  folder.write("text/long.txt", text);
  folder.write("text/zafter.txt", "after");
  const Corpus corpus = open({(folder / "text").string()});
  ASSERT_EQ(corpus.documents(), 3);
  EXPECT_EQ(tokens_of(corpus, 0), tokenizer->encode_document("before"));
  EXPECT_EQ(tokens_of(corpus, 1), tokenizer->encode_document(text));
  EXPECT_EQ(tokens_of(corpus, 2), tokenizer->encode_document("after"));
}

TEST_F(CorpusTest, ReusesACacheOfTheSameFilesOnly) {
  const std::string file = folder.write("a.txt", "first");
  std::vector<std::string> messages;
  CorpusOptions options;
  options.cache = folder / "cache";
  options.keep_cache = true;
  options.message = [&](const std::string& text) { messages.push_back(text); };
  open({file}, options);
  const Corpus again = open({file}, options);
  EXPECT_EQ(messages.size(), 1U);
  EXPECT_EQ(tokens_of(again, 0), tokenizer->encode_document("first"));
  folder.write("a.txt", "second");
  EXPECT_NE(error({file}, options).find("cache: was made from other files"), std::string::npos);
  const Corpus kept = open({(folder / "cache").string()});  // the way out that the message names
  EXPECT_EQ(tokens_of(kept, 0), tokenizer->encode_document("first"));
  options.keep_cache = false;
  EXPECT_EQ(tokens_of(open({file}, options), 0), tokenizer->encode_document("second"));
  folder.write("a.txt", "SECOND");  // as long, but later
  std::filesystem::last_write_time(
      file, std::filesystem::file_time_type::clock::now() + std::chrono::seconds(2));
  EXPECT_EQ(tokens_of(open({file}, options), 0), tokenizer->encode_document("SECOND"));
  EXPECT_EQ(messages.size(), 3U);
  OtherBytes other;
  open_corpus({file}, other, options);
  EXPECT_EQ(messages.size(), 4U);
  EXPECT_EQ(tokens_of(again, 0), tokenizer->encode_document("first"));  // still mapped
}

TEST_F(CorpusTest, LeavesAForeignFolderInTheCachesPlace) {
  const std::string file = folder.write("a.txt", "first");
  folder.write("cache/mine.txt", "mine");
  CorpusOptions options;
  options.cache = folder / "cache";
  EXPECT_NE(error({file}, options).find("cache: is in the way"), std::string::npos);
  EXPECT_EQ(testing::read_file(folder / "cache/mine.txt"), "mine");
}

TEST_F(CorpusTest, ReadsTokenFoldersThatOthersWrote) {
  std::filesystem::create_directory(folder / "tokens");
  const std::vector<int64_t> tokens = {256, 1, 2, 256, 256, 3, 256};
  const std::vector<int64_t> documents = {0, 4, 7};
  for (const int64_t item_bytes : {2, 4, 8}) {
    NpyWriter token_file(folder / "tokens/tokens.npy", item_bytes);
    token_file.append(tokens.data(), 7);
    token_file.close();
    NpyWriter document_file(folder / "tokens/documents.npy", 8);
    document_file.append(documents.data(), 3);
    document_file.close();
    const Corpus corpus = open({(folder / "tokens").string()});
    ASSERT_EQ(corpus.documents(), 2);
    EXPECT_EQ(tokens_of(corpus, 1), (std::vector<int64_t>{256, 3, 256}));
    EXPECT_EQ(corpus.name(1), "tokens:1");
    EXPECT_FALSE(corpus.bytes(1).has_value());
  }
}

TEST_F(CorpusTest, NamesATokenOutsideTheVocabulary) {
  std::filesystem::create_directory(folder / "tokens");
  TokenFolderWriter writer(folder / "tokens/made", 300);
  writer.append({1, 256});
  writer.end_document("a", 1);
  writer.append({2, 257});
  writer.end_document("b", 1);
  writer.close("{}");
  const Corpus corpus = open({(folder / "tokens/made").string()});
  EXPECT_EQ(tokens_of(corpus, 0), (std::vector<int64_t>{1, 256}));
  const std::string message = message_of<std::runtime_error>([&] { tokens_of(corpus, 1); });
  EXPECT_NE(message.find("token 3 is 257"), std::string::npos) << message;
}

TEST_F(CorpusTest, KeepsTokensOfLargeVocabularies) {
  const std::vector<int64_t> tokens = {0, 65'535, 65'536, 99'999};
  TokenFolderWriter writer(folder / "made", 100'000);
  writer.append(tokens);
  writer.end_document("a", 4);
  writer.close("{}");
  const TokenFolder made(folder / "made", 100'000);
  std::vector<int64_t> read(4);
  made.copy(0, 0, 4, read.data());
  EXPECT_EQ(read, tokens);
}

TEST_F(CorpusTest, HoldsOutATenthByName) {
  for (int i = 0; i < 200; ++i) folder.write("text/" + std::to_string(i), "text");
  const auto [training, held_out] = open({(folder / "text").string()}).split(*tokenizer);
  EXPECT_EQ(training.documents() + held_out.documents(), 200);
  EXPECT_NEAR(static_cast<double>(held_out.documents()), 20, 13);  // three standard deviations
  for (int64_t n = 0; n < held_out.documents(); ++n) EXPECT_EQ(crc32(held_out.name(n)) % 10, 0U);
  for (int64_t n = 0; n < training.documents(); ++n) EXPECT_NE(crc32(training.name(n)) % 10, 0U);
}

TEST_F(CorpusTest, HoldsOutTheEndOfASingleDocument) {
  const std::string file = folder.write("a.txt", std::string(98, 'a') + std::string(10, 'b'));
  const auto [training, held_out] = open({file}).split(*tokenizer);
  ASSERT_EQ(training.documents(), 1);
  ASSERT_EQ(held_out.documents(), 1);
  EXPECT_EQ(training.length(0), 99);  // bos and 98 times a
  EXPECT_EQ(held_out.length(0), 11);  // 10 times b and eos
  EXPECT_EQ(training.bytes(0), 98);
  EXPECT_EQ(held_out.bytes(0), 10);
  EXPECT_EQ(tokens_of(held_out, 0).front(), 'b');
}

TEST_F(CorpusTest, SamplesAsManyTokensAsAsked) {
  for (int i = 0; i < 20; ++i) folder.write("text/" + std::to_string(i), std::string(98, 'a'));
  const Corpus corpus = open({(folder / "text").string()});
  EXPECT_EQ(corpus.sample(0, *tokenizer).tokens(), 2000);
  const Corpus sample = corpus.sample(250, *tokenizer);
  EXPECT_EQ(sample.tokens(), 250);
  ASSERT_EQ(sample.documents(), 3);
  EXPECT_EQ(sample.bytes(2), 49);
}

TEST_F(CorpusTest, NamesWhatIsWrong) {
  EXPECT_EQ(error({(folder / "missing").string()}),
            (folder / "missing").string() + ": does not exist");
  const std::string empty = folder.write("empty.txt", "");
  EXPECT_EQ(error({empty}), empty + ": is empty");
  std::filesystem::create_directory(folder / "nothing");
  EXPECT_NE(error({(folder / "nothing").string()}).find("holds no text files"), std::string::npos);
  std::filesystem::create_symlink("loop.txt", folder / "loop.txt");
  EXPECT_NE(error({(folder / "loop.txt").string()}).find("loop.txt"), std::string::npos);
  EXPECT_FALSE(std::filesystem::exists(folder / "cache"));
}

TEST_F(CorpusTest, NamesABrokenTokenFolder) {
  TokenFolderWriter writer(folder / "made", 257);
  writer.append({256, 1, 256});
  writer.end_document("a", 1);
  writer.close("{}");
  const std::string tokens = testing::read_file(folder / "made/tokens.npy");
  folder.write("made/tokens.npy", tokens.substr(0, tokens.size() - 2));
  EXPECT_NE(error({(folder / "made").string()}).find("holds 2 of its 3 items"), std::string::npos);
  folder.write("made/tokens.npy", "no array");
  EXPECT_NE(error({(folder / "made").string()}).find("tokens.npy"), std::string::npos);
  folder.write("made/tokens.npy", tokens);

  const std::string names = testing::read_file(folder / "made/names.txt");
  folder.write("made/names.txt", names + "b\n");
  EXPECT_NE(error({(folder / "made").string()}).find("names.txt: must hold 1 lines"),
            std::string::npos);
  folder.write("made/names.txt", names);
  const auto write_array = [&](const std::string& name, const std::vector<int64_t>& values) {
    NpyWriter file(folder / ("made/" + name), 8);
    file.append(values.data(), static_cast<int64_t>(values.size()));
    file.close();
  };
  write_array("bytes.npy", {1, 1});
  EXPECT_NE(error({(folder / "made").string()}).find("bytes.npy: must hold 1 sizes"),
            std::string::npos);
  write_array("bytes.npy", {1});
  for (const std::vector<int64_t>& starts :
       std::vector<std::vector<int64_t>>{{0, 2}, {1, 3}, {0, 4}, {0, 3, 2, 3}, {}}) {
    write_array("documents.npy", starts);
    EXPECT_NE(error({(folder / "made").string()}).find("documents.npy: must rise from 0"),
              std::string::npos);
  }
  std::filesystem::remove(folder / "made/documents.npy");
  EXPECT_NE(error({(folder / "made").string()}).find("documents.npy"), std::string::npos);
}

TEST(OutputFile, ReportsAFullDisk) {
  OutputFile file("/dev/full");
  file.write("text");
  EXPECT_EQ(message_of<std::runtime_error>([&] { file.flush(); }),
            "/dev/full: cannot be written: No space left on device");
}

TEST(Crc32, AgreesWithPublishedValues) {
  EXPECT_EQ(crc32("123456789"), 0xCBF43926U);
  EXPECT_EQ(crc32c("123456789"), 0xE3069283U);
  EXPECT_EQ(crc32("456789", crc32("123")), crc32("123456789"));
}

}  // namespace
}  // namespace gdn
