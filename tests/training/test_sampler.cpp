#include <algorithm>
#include <map>

#include <gdn/training/sampler.h>
#include <gdn/training/tokenizer.h>

#include "support.h"

namespace gdn {
namespace {

using testing::TestFolder;

class SamplerTest : public ::testing::Test {
 protected:
  SamplerTest() {
    std::vector<std::string> files;
    for (const int bytes : {1, 5, 30, 62, 200, 7, 63, 4}) {  // and two tokens around each
      files.push_back(folder.write(std::to_string(bytes), testing::some_text(bytes, bytes)));
    }
    corpus = open_corpus(files, *make_tokenizer("byte"));
  }

  TestFolder folder;
  Corpus corpus;
};

TEST_F(SamplerTest, PacksWhatItSays) {
  Sampler sampler(corpus, 64, 96, 1);
  for (int i = 0; i < 20; ++i) {
    const Batch batch = sampler.next();
    ASSERT_EQ(batch.input_ids.size(), 96U);
    ASSERT_EQ(batch.cu_seqlens.size(), batch.sequences.size() + 1);
    EXPECT_EQ(batch.cu_seqlens.front(), 0);
    EXPECT_EQ(batch.cu_seqlens.back(), 96);
    for (size_t n = 0; n < batch.sequences.size(); ++n) {
      const auto& [document, begin, end] = batch.sequences[n];
      ASSERT_EQ(batch.cu_seqlens[n + 1] - batch.cu_seqlens[n], end - begin);
      ASSERT_GT(end, begin);
      EXPECT_LE(end - begin, 64);
      EXPECT_LE(end, corpus.length(document));
      std::vector<int64_t> expected(end - begin);
      corpus.copy(document, begin, end, expected.data());
      const auto first = batch.input_ids.begin() + batch.cu_seqlens[n];
      EXPECT_TRUE(std::equal(expected.begin(), expected.end(), first));
    }
  }
}

TEST_F(SamplerTest, GivesEveryTokenOnceAnEpoch) {
  // Batches that divide an epoch, so that epochs end with batches.
  ASSERT_EQ(corpus.tokens(), 388);
  Sampler sampler(corpus, 64, 97, 1);
  for (int epoch = 0; epoch < 3; ++epoch) {
    std::map<std::pair<int64_t, int64_t>, int> seen;
    for (int i = 0; i < 4; ++i) {
      for (const auto& [document, begin, end] : sampler.next().sequences) {
        for (int64_t t = begin; t < end; ++t) ++seen[{document, t}];
      }
    }
    EXPECT_EQ(seen.size(), 388U);
    for (const auto& [token, times] : seen) EXPECT_EQ(times, 1);
    EXPECT_EQ(sampler.epoch(), epoch + 1);
  }
}

TEST_F(SamplerTest, ShufflesByEpochAndSeed) {
  Sampler a(corpus, 64, 388, 1), b(corpus, 64, 388, 1), c(corpus, 64, 388, 2);
  const auto first = a.next().input_ids;
  EXPECT_EQ(first, b.next().input_ids);
  EXPECT_NE(first, c.next().input_ids);
  EXPECT_NE(first, a.next().input_ids);
}

TEST_F(SamplerTest, GoesOnFromAnyPosition) {
  Sampler sampler(corpus, 64, 50, 3);
  for (int i = 0; i < 30; ++i) {  // almost four epochs
    Sampler resumed(corpus, 64, 50, 3);
    resumed.seek(sampler.position());
    const Batch expected = sampler.next(), got = resumed.next();
    ASSERT_EQ(got.input_ids, expected.input_ids);
    ASSERT_EQ(got.cu_seqlens, expected.cu_seqlens);
    ASSERT_EQ(resumed.position(), sampler.position());
  }
}

TEST_F(SamplerTest, WantsASequenceThatTheDataFill) {
  const std::string message =
      testing::message_of<std::invalid_argument>([&] { Sampler(corpus, 389, 389, 0); });
  EXPECT_EQ(message, "seq_len must be at most the training data's 388 tokens, got 389");
  EXPECT_EQ(Sampler(corpus, 388, 388, 0).next().input_ids.size(), 388U);
}

TEST_F(SamplerTest, DescribesABatch) {
  const Sampler sampler(corpus, 64, 20, 0);
  Batch batch;
  batch.sequences = {{2, 5, 31}, {0, 0, 3}};
  EXPECT_EQ(sampler.describe(batch), "30 tokens 5 to 31, 1 tokens 0 to 3");
  Batch many;
  many.sequences.assign(10, {1, 0, 2});
  const std::string text = sampler.describe(many);
  EXPECT_EQ(std::count(text.begin(), text.end(), ','), 7) << text;
  EXPECT_TRUE(text.ends_with(" and 2 more")) << text;
}

}  // namespace
}  // namespace gdn
