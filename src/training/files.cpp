#include <cerrno>
#include <cstring>
#include <fcntl.h>
#include <stdexcept>
#include <sys/file.h>
#include <unistd.h>
#include <utility>

#include <gdn/models/atomic_file.h>
#include <gdn/models/mapped_file.h>
#include <gdn/training/files.h>

namespace gdn {
namespace {

constexpr size_t kBufferBytes = 1 << 20;

[[noreturn]] void fail_with_errno(const std::filesystem::path& file, const char* what) {
  throw std::runtime_error(file.string() + ": " + what + ": " + std::strerror(errno));
}

}  // namespace

OutputFile::OutputFile(const std::filesystem::path& file, Mode mode) : file_(file) {
  const int how = mode == Mode::append ? O_APPEND : O_TRUNC;
  descriptor_ = ::open(file.c_str(), O_WRONLY | O_CREAT | O_CLOEXEC | how, 0644);
  if (descriptor_ < 0) fail("cannot be created");
}

OutputFile::~OutputFile() {
  if (descriptor_ >= 0) ::close(descriptor_);
}

void OutputFile::fail(const char* what) const { fail_with_errno(file_, what); }

void OutputFile::write(std::string_view bytes) {
  buffer_.append(bytes);
  if (buffer_.size() >= kBufferBytes) flush();
}

void OutputFile::flush() {
  std::string_view rest = buffer_;
  while (!rest.empty()) {
    const ssize_t written = ::write(descriptor_, rest.data(), rest.size());
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) fail("cannot be written");
    rest.remove_prefix(static_cast<size_t>(written));
  }
  buffer_.clear();
}

void OutputFile::rewrite_start(std::string_view bytes) {
  flush();
  if (::pwrite(descriptor_, bytes.data(), bytes.size(), 0) != static_cast<ssize_t>(bytes.size())) {
    fail("cannot be written");
  }
}

void OutputFile::close() {
  flush();
  if (::fsync(descriptor_) != 0) fail("cannot be synced");
  const int descriptor = std::exchange(descriptor_, -1);
  if (::close(descriptor) != 0) fail("cannot be closed");
}

FileLock::FileLock(const std::filesystem::path& file, const std::string& busy) {
  descriptor_ = ::open(file.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644);
  if (descriptor_ < 0) fail_with_errno(file, "cannot be created");
  if (::flock(descriptor_, LOCK_EX | LOCK_NB) == 0) return;
  const int error = errno;
  ::close(descriptor_);
  if (error == EWOULDBLOCK) throw std::runtime_error(file.string() + ": " + busy);
  errno = error;
  fail_with_errno(file, "cannot be locked");
}

FileLock::~FileLock() { ::close(descriptor_); }

std::string read_text(const std::filesystem::path& file) {
  return std::string(MappedFile(file).bytes());
}

void write_text_atomically(const std::filesystem::path& file, std::string_view text) {
  AtomicFile output(file);
  output.write(text);
  output.commit();
}

}  // namespace gdn
