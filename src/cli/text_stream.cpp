#include <algorithm>
#include <cstddef>

#include <gdn/cli/text_stream.h>

namespace gdn::cli {
namespace {

constexpr std::string_view kReplacement = "\xEF\xBF\xBD";  // U+FFFD

enum class Utf8 { valid, invalid, incomplete };

struct Character {
  Utf8 kind;
  size_t bytes;
};

/// The character at the start of `text`, which is not empty (Unicode 15, table 3-7).
Character first_character(std::string_view text) {
  const auto byte = [&](size_t i) { return static_cast<unsigned char>(text[i]); };
  const unsigned char lead = byte(0);
  size_t length = 1;
  if (lead >= 0x80) {
    if (lead < 0xC2 || lead > 0xF4) return {Utf8::invalid, 1};
    length = lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
  }
  // The second byte excludes overlong forms, surrogates, and what lies beyond U+10FFFF.
  unsigned char low = lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
  unsigned char high = lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
  for (size_t i = 1; i < length; ++i) {
    if (i == text.size()) return {Utf8::incomplete, i};
    if (byte(i) < low || byte(i) > high) return {Utf8::invalid, i};
    low = 0x80;
    high = 0xBF;
  }
  return {Utf8::valid, length};
}

/// Moves `text` to the result, all but an incomplete last character.
std::string take_characters(std::string_view& text) {
  std::string result;
  while (!text.empty()) {
    const Character character = first_character(text);
    if (character.kind == Utf8::incomplete) break;
    result += character.kind == Utf8::valid ? text.substr(0, character.bytes) : kReplacement;
    text.remove_prefix(character.bytes);
  }
  return result;
}

/// Length of the longest end of `text` with which `stop` begins.
size_t overlap(std::string_view text, std::string_view stop) {
  size_t length = std::min(text.size(), stop.size());
  while (!stop.starts_with(text.substr(text.size() - length))) --length;
  return length;
}

}  // namespace

std::string TextStream::append(std::string_view bytes) {
  if (stopped_) return {};
  pending_ += bytes;
  size_t end = pending_.size();
  for (const std::string& stop : stops_) {
    const size_t at = pending_.find(stop);
    if (at == std::string::npos) continue;
    stopped_ = true;
    end = std::min(end, at);
  }
  if (stopped_) {
    pending_.resize(end);
    return finish();
  }
  size_t held = 0;
  for (const std::string& stop : stops_) held = std::max(held, overlap(pending_, stop));
  std::string_view sure(pending_.data(), pending_.size() - held);
  std::string text = take_characters(sure);
  pending_.erase(0, sure.data() - pending_.data());
  return text;
}

std::string TextStream::finish() {
  std::string_view rest = pending_;
  std::string text = take_characters(rest);
  if (!rest.empty()) text += kReplacement;
  pending_.clear();
  return text;
}

}  // namespace gdn::cli
