#include <cerrno>
#include <fcntl.h>
#include <stdexcept>
#include <sys/mman.h>
#include <sys/stat.h>
#include <system_error>
#include <unistd.h>

#include <gdn/models/mapped_file.h>

namespace gdn {
namespace {

[[noreturn]] void fail_with_errno(const std::filesystem::path& file) {
  throw std::runtime_error(file.string() +
                           ": cannot be read: " + std::generic_category().message(errno));
}

/// Closes itself: the mapping outlives the descriptor.
struct Descriptor {
  int number;
  ~Descriptor() {
    if (number >= 0) ::close(number);
  }
};

}  // namespace

MappedFile::MappedFile(const std::filesystem::path& file) {
  // Not blocking: opening a named pipe would wait for its writer.
  const Descriptor descriptor{::open(file.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)};
  struct stat status {};
  if (descriptor.number < 0 || ::fstat(descriptor.number, &status) != 0) fail_with_errno(file);
  if (!S_ISREG(status.st_mode)) {
    throw std::runtime_error(file.string() + ": is not a regular file");
  }
  if (status.st_size == 0) return;  // mmap rejects length 0
  size_ = static_cast<size_t>(status.st_size);
  void* mapping = ::mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, descriptor.number, 0);
  if (mapping == MAP_FAILED) fail_with_errno(file);
  data_ = static_cast<char*>(mapping);
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) ::munmap(data_, size_);
}

}  // namespace gdn
