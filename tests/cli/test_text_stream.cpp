// Text that is shown while it is generated: whole characters, and nothing of a stop string.
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include <gdn/cli/text_stream.h>

namespace gdn::cli {
namespace {

/// What is shown after each byte, and last what finish() adds.
std::vector<std::string> by_bytes(TextStream stream, const std::string& bytes) {
  std::vector<std::string> shown;
  for (const char byte : bytes) shown.push_back(stream.append(std::string(1, byte)));
  shown.push_back(stream.finish());
  return shown;
}

using Shown = std::vector<std::string>;

TEST(TextStream, CharactersAppearWhenTheyAreWhole) {
  EXPECT_EQ(
      by_bytes(TextStream(), "a\xC3\xA9\xE2\x82\xAC\xF0\x9F\x98\x80"),
      (Shown{"a", "", "\xC3\xA9", "", "", "\xE2\x82\xAC", "", "", "", "\xF0\x9F\x98\x80", ""}));
}

TEST(TextStream, BytesThatAreNoUtf8AreReplaced) {
  const std::string bad = "\xEF\xBF\xBD";
  EXPECT_EQ(by_bytes(TextStream(), "\xFF"), (Shown{bad, ""}));
  EXPECT_EQ(by_bytes(TextStream(), "\xC3x"), (Shown{"", bad + "x", ""}));
  EXPECT_EQ(by_bytes(TextStream(), "\xE2\x82"), (Shown{"", "", bad}));
  EXPECT_EQ(by_bytes(TextStream(), "\xC0\xAF"), (Shown{bad, bad, ""}));       // overlong '/'
  EXPECT_EQ(by_bytes(TextStream(), "\xED\xA0"), (Shown{"", bad + bad, ""}));  // a surrogate
  EXPECT_EQ(by_bytes(TextStream(), "\xE0\x9F"), (Shown{"", bad + bad, ""}));  // below U+0800
  EXPECT_EQ(by_bytes(TextStream(), "\xF0\x8F"), (Shown{"", bad + bad, ""}));  // below U+10000
  EXPECT_EQ(by_bytes(TextStream(), "\xF4\x90"), (Shown{"", bad + bad, ""}));  // past U+10FFFF
}

TEST(TextStream, StopStringIsNotShown) {
  TextStream stream({"END"});
  EXPECT_EQ(stream.append("one E"), "one ");
  EXPECT_EQ(stream.append("Nough"), "ENough");
  EXPECT_EQ(stream.append(" EN"), " ");
  EXPECT_FALSE(stream.stopped());
  EXPECT_EQ(stream.append("D two"), "");
  EXPECT_TRUE(stream.stopped());
  EXPECT_EQ(stream.append("three"), "");
  EXPECT_EQ(stream.finish(), "");
}

TEST(TextStream, EarliestOfSeveralStopsCounts) {
  for (const std::vector<std::string>& stops : {std::vector<std::string>{"zz", "b"}, {"b", "zz"}}) {
    TextStream stream(stops);
    EXPECT_EQ(stream.append("abzz"), "a");
    EXPECT_TRUE(stream.stopped());
  }
}

TEST(TextStream, WhatLooksLikeAStopIsShownAtTheEnd) {
  TextStream stream({"\n\n"});
  EXPECT_EQ(stream.append("x\n"), "x");
  EXPECT_EQ(stream.finish(), "\n");
}

}  // namespace
}  // namespace gdn::cli
