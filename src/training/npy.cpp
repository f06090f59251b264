#include <bit>
#include <cstring>
#include <regex>
#include <stdexcept>
#include <string>

#include <gdn/training/npy.h>

namespace gdn {
namespace {

static_assert(std::endian::native == std::endian::little, "arrays are mapped as they are stored");

constexpr std::string_view kMagic("\x93NUMPY", 6);
/// Room for any length, and a multiple of 64, which keeps the data aligned.
constexpr size_t kHeaderBytes = 128;

template <typename Item>
void copy_items(const char* data, int64_t begin, int64_t end, int64_t* out) {
  for (int64_t i = begin; i < end; ++i) {
    Item item;
    std::memcpy(&item, data + i * static_cast<int64_t>(sizeof(Item)), sizeof(Item));
    out[i - begin] = static_cast<int64_t>(item);
  }
}

}  // namespace

NpyArray::NpyArray(const std::filesystem::path& file) : file_(file) {
  const std::string_view bytes = file_.bytes();
  const auto reject = [&](const std::string& what) {
    throw std::runtime_error(file.string() + ": must be a one-dimensional little-endian integer " +
                             "array in .npy format, but " + what);
  };
  if (bytes.size() < 12 || bytes.substr(0, kMagic.size()) != kMagic) reject("has no .npy header");
  uint32_t header_bytes = 0;  // two bytes in version 1, four since version 2
  const size_t length_bytes = bytes[6] == 1 ? 2 : 4;
  std::memcpy(&header_bytes, bytes.data() + 8, length_bytes);
  const size_t start = 8 + length_bytes + header_bytes;
  if (start > bytes.size()) reject("is cut off in its header");
  const std::string header(bytes.substr(8 + length_bytes, header_bytes));

  std::smatch match;
  if (!std::regex_search(header, match, std::regex(R"('descr': *'([<|][ui][1248])')"))) {
    reject("is described as " + header);
  }
  item_bytes_ = match.str(1).back() - '0';
  if (!std::regex_search(header, match, std::regex(R"('shape': *\(([0-9]{1,18}),\))"))) {
    reject("is described as " + header);
  }
  size_ = std::stoll(match.str(1));
  const auto available = static_cast<int64_t>(bytes.size() - start) / item_bytes_;
  if (size_ > available) {
    reject("holds " + std::to_string(available) + " of its " + std::to_string(size_) + " items");
  }
  data_ = bytes.data() + start;
}

int64_t NpyArray::operator[](int64_t index) const {
  int64_t item = 0;
  copy(index, index + 1, &item);
  return item;
}

void NpyArray::copy(int64_t begin, int64_t end, int64_t* out) const {
  switch (item_bytes_) {
    case 1:
      return copy_items<uint8_t>(data_, begin, end, out);
    case 2:
      return copy_items<uint16_t>(data_, begin, end, out);
    case 4:
      return copy_items<uint32_t>(data_, begin, end, out);
    default:
      return copy_items<int64_t>(data_, begin, end, out);
  }
}

NpyWriter::NpyWriter(const std::filesystem::path& file, int64_t item_bytes)
    : file_(file), item_bytes_(item_bytes) {
  file_.write(header());
}

void NpyWriter::append(const int64_t* values, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    file_.write({reinterpret_cast<const char*>(values + i), static_cast<size_t>(item_bytes_)});
  }
  size_ += count;
}

void NpyWriter::close() {
  file_.rewrite_start(header());
  file_.close();
}

std::string NpyWriter::header() const {
  const std::string type = item_bytes_ == 8 ? "<i8" : "<u" + std::to_string(item_bytes_);
  std::string text = "{'descr': '" + type + "', 'fortran_order': False, 'shape': (" +
                     std::to_string(size_) + ",), }";
  text.resize(kHeaderBytes - kMagic.size() - 4, ' ');
  text.back() = '\n';
  const auto length = static_cast<uint16_t>(text.size());
  std::string bytes(kMagic);
  bytes += {'\x01', '\x00', static_cast<char>(length & 0xFF), static_cast<char>(length >> 8)};
  return bytes + text;
}

}  // namespace gdn
