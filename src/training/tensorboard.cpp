#include <bit>
#include <chrono>
#include <unistd.h>

#include <gdn/training/crc32.h>
#include <gdn/training/tensorboard.h>

namespace gdn {
namespace {

double now() {
  return std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count();
}

template <typename Unsigned>
std::string little_endian(Unsigned value) {
  std::string bytes;
  for (size_t i = 0; i < sizeof(Unsigned); ++i) bytes += static_cast<char>(value >> (8 * i));
  return bytes;
}

// Protocol buffer fields: a tag of field number and wire type, then the value.

std::string varint(uint64_t value) {
  std::string bytes;
  for (; value >= 0x80; value >>= 7) bytes += static_cast<char>(value | 0x80);
  return bytes + static_cast<char>(value);
}

std::string tag(int field, int wire_type) {
  return varint(static_cast<uint64_t>(field) << 3 | wire_type);
}

std::string int_field(int field, int64_t value) {
  return tag(field, 0) + varint(static_cast<uint64_t>(value));
}
std::string double_field(int field, double value) {
  return tag(field, 1) + little_endian(std::bit_cast<uint64_t>(value));
}
std::string bytes_field(int field, std::string_view value) {
  return tag(field, 2) + varint(value.size()) + std::string(value);
}
std::string float_field(int field, float value) {
  return tag(field, 5) + little_endian(std::bit_cast<uint32_t>(value));
}

/// The checksum of TFRecord files, which may hold checksums themselves.
uint32_t masked_crc32c(std::string_view bytes) {
  const uint32_t crc = crc32c(bytes);
  return ((crc >> 15) | (crc << 17)) + 0xA282EAD8U;
}

std::filesystem::path file_name(const std::filesystem::path& folder) {
  char host[256] = "localhost";
  ::gethostname(host, sizeof(host) - 1);
  return folder / ("events.out.tfevents." + std::to_string(static_cast<int64_t>(now())) + "." +
                   host + "." + std::to_string(::getpid()));
}

}  // namespace

TensorBoardWriter::TensorBoardWriter(const std::filesystem::path& folder)
    : file_(file_name(folder), OutputFile::Mode::append) {
  write_record(double_field(1, now()) + bytes_field(3, "brain.Event:2"));
}

void TensorBoardWriter::write(int64_t step, const std::vector<Scalar>& scalars) {
  std::string summary;
  for (const Scalar& scalar : scalars) {
    summary += bytes_field(
        1, bytes_field(1, scalar.tag) + float_field(2, static_cast<float>(scalar.value)));
  }
  write_record(double_field(1, now()) + int_field(2, step) + bytes_field(5, summary));
}

void TensorBoardWriter::write_record(std::string_view event) {
  const std::string length = little_endian(static_cast<uint64_t>(event.size()));
  file_.write(length + little_endian(masked_crc32c(length)));
  file_.write(event);
  file_.write(little_endian(masked_crc32c(event)));
  file_.flush();
}

}  // namespace gdn
