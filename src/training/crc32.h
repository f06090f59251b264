// Cyclic redundancy checks: crc32 as in zlib, crc32c as in TFRecord files.
#pragma once

#include <array>
#include <cstdint>
#include <string_view>

namespace gdn {

/// `polynomial` with its bits reversed.
template <uint32_t polynomial>
constexpr uint32_t reflected_crc32(std::string_view bytes, uint32_t crc = 0) {
  constexpr auto table = [] {
    std::array<uint32_t, 256> entries{};
    for (uint32_t i = 0; i < 256; ++i) {
      uint32_t entry = i;
      for (int bit = 0; bit < 8; ++bit) entry = (entry >> 1) ^ ((entry & 1) ? polynomial : 0);
      entries[i] = entry;
    }
    return entries;
  }();
  crc = ~crc;
  for (const char byte : bytes) crc = (crc >> 8) ^ table[(crc ^ static_cast<uint8_t>(byte)) & 0xFF];
  return ~crc;
}

constexpr uint32_t crc32(std::string_view bytes, uint32_t crc = 0) {
  return reflected_crc32<0xEDB88320>(bytes, crc);
}
constexpr uint32_t crc32c(std::string_view bytes) { return reflected_crc32<0x82F63B78>(bytes); }

}  // namespace gdn
