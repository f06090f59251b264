#include <cerrno>
#include <fcntl.h>
#include <stdexcept>
#include <string>
#include <sys/file.h>
#include <sys/stat.h>
#include <system_error>
#include <unistd.h>
#include <utility>

#include <gdn/models/atomic_file.h>

namespace gdn {

AtomicFile::AtomicFile(std::filesystem::path target)
    : target_(std::move(target)), temporary_(target_) {
  std::string name = ".";
  name += target_.filename().string();
  name += ".tmp";
  temporary_.replace_filename(name);
  descriptor_ = ::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_CLOEXEC, 0666);
  if (descriptor_ < 0) fail("cannot be written");
  // The lock goes with its process, so that no leftover stands in the way. The name may have been
  // renamed away between open and lock; then this descriptor is someone's finished file.
  struct stat held {
  }, named{};
  const bool ours = ::flock(descriptor_, LOCK_EX | LOCK_NB) == 0 &&
                    ::fstat(descriptor_, &held) == 0 && ::stat(temporary_.c_str(), &named) == 0 &&
                    held.st_ino == named.st_ino;
  if (!ours) {
    ::close(std::exchange(descriptor_, -1));
    throw std::runtime_error(target_.string() + ": another process is writing it");
  }
  if (::ftruncate(descriptor_, 0) != 0) {
    const int error = errno;
    ::close(std::exchange(descriptor_, -1));
    errno = error;
    fail("cannot be written");
  }
}

AtomicFile::~AtomicFile() {
  if (descriptor_ < 0) return;
  ::unlink(temporary_.c_str());
  ::close(descriptor_);
}

void AtomicFile::write(const void* data, size_t size) {
  const char* next = static_cast<const char*>(data);
  while (size > 0) {
    const ssize_t written = ::write(descriptor_, next, size);
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) fail("cannot be written");
    next += written;
    size -= static_cast<size_t>(written);
  }
}

void AtomicFile::commit() {
  if (::fsync(descriptor_) != 0) fail("cannot be synced");
  if (::rename(temporary_.c_str(), target_.c_str()) != 0) fail("cannot be renamed into place");
  ::close(std::exchange(descriptor_, -1));
  sync_folder(target_.parent_path());
}

void AtomicFile::fail(const char* what) const {
  const std::string reason = std::generic_category().message(errno);
  throw std::runtime_error(target_.string() + ": " + what + ": " + reason);
}

void sync_folder(const std::filesystem::path& folder) {
  const std::filesystem::path path = folder.empty() ? "." : folder;
  const int descriptor = ::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  const int result = descriptor < 0 ? -1 : ::fsync(descriptor);
  const std::string reason = std::generic_category().message(errno);
  if (descriptor >= 0) ::close(descriptor);
  if (result != 0) throw std::runtime_error(path.string() + ": cannot be synced: " + reason);
}

}  // namespace gdn
