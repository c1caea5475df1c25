#include "file_engine.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

namespace holdfast {

FileError error_of(int code, const std::string& path) {
  return {code, std::strerror(code), path};
}

namespace {

bool direct_by_environment() {
  const char* allowed = std::getenv("HOLDFAST_FILE_DIRECT");
  return !allowed || std::string(allowed) != "0";
}

}  // namespace

FileEngineCore::FileEngineCore(const std::string& kind, unsigned queue_depth, int threads,
                               std::optional<bool> direct, bool background)
    : depth_(queue_depth),
      allow_direct_(direct.value_or(direct_by_environment())),
      process_(getpid()) {
  std::string wanted = kind;
  const char* named = std::getenv("HOLDFAST_FILE_ENGINE");
  if (wanted == "auto" && named && *named) wanted = named;
  if (queue_depth < 1 || threads < 1) {
    throw std::invalid_argument("a file engine needs a queue_depth and threads of 1 or more");
  }
  std::string reason;
  if (wanted == "auto" || wanted == "io_uring") {
    backend_ = make_uring_backend(*this, depth_, background, reason);
    if (!backend_ && wanted == "io_uring") {
      throw std::runtime_error("the file engine \"io_uring\" cannot be used here: " + reason);
    }
  } else if (wanted != "threads") {
    throw std::runtime_error("there is no file engine \"" + wanted +
                             "\"; choose auto, io_uring or threads");
  }
  if (!backend_) backend_ = make_thread_backend(*this, threads);
}

FileEngineCore::~FileEngineCore() { close(); }

std::shared_ptr<EngineFile> FileEngineCore::file_of(int file) {
  auto found = files_.find(file);
  if (found == files_.end()) {
    throw std::invalid_argument("file " + std::to_string(file) + " is not open in this engine");
  }
  return found->second;
}

bool FileEngineCore::take_fault(const std::string& operation, int& error) {
  auto found = faults_.find(operation);
  if (found == faults_.end()) return false;
  Fault& fault = found->second;
  if (fault.after > 0) {
    --fault.after;
    return false;
  }
  error = fault.error;
  if (--fault.count == 0) faults_.erase(found);
  return true;
}

int FileEngineCore::open(const std::string& path, bool write, bool create, bool truncate,
                         std::int64_t size, FileError& error) {
  {
    std::lock_guard lock(mutex_);
    int code = 0;
    if (take_fault("open", code)) {
      error = error_of(code, path);
      return -1;
    }
  }
  auto file = std::make_shared<EngineFile>();
  file->path = path;
  const int access = (write ? O_RDWR : O_RDONLY) | O_CLOEXEC;
  const int flags = access | (create ? O_CREAT : 0) | (truncate ? O_TRUNC : 0);
  file->buffered = ::open(path.c_str(), flags, 0666);
  if (file->buffered < 0) {
    error = error_of(errno, path);
    return -1;
  }
  if (write && size >= 0) {
    int code = 0;
    struct stat status;
    if (fstat(file->buffered, &status) != 0) code = errno;
    if (!code && status.st_size > size && ftruncate(file->buffered, size) != 0) code = errno;
    if (!code && size > 0 && fallocate(file->buffered, 0, 0, size) != 0) {
      code = errno;
      if (code == EOPNOTSUPP || code == ENOSYS || code == EINVAL) {
        code = ftruncate(file->buffered, size) != 0 ? errno : 0;
      }
    }
    if (code) {
      ::close(file->buffered);
      error = error_of(code, path);
      return -1;
    }
  }
  if (allow_direct_) file->direct = ::open(path.c_str(), access | O_DIRECT);
  std::lock_guard lock(mutex_);
  const int number = next_file_++;
  files_[number] = file;
  backend_->opened(*file);
  return number;
}

bool FileEngineCore::is_direct(int file) {
  std::lock_guard lock(mutex_);
  return file_of(file)->direct >= 0;
}

bool FileEngineCore::wait_file(int file, std::chrono::milliseconds slice) {
  std::unique_lock lock(mutex_);
  auto found = file_of(file);
  return progress_.wait_for(lock, slice, [&] { return found->in_flight == 0; });
}

FileError FileEngineCore::sync(int file) {
  std::shared_ptr<EngineFile> found;
  {
    std::lock_guard lock(mutex_);
    found = file_of(file);
    int code = 0;
    if (take_fault("sync", code) && code) return error_of(code, found->path);
  }
  return fdatasync(found->buffered) == 0 ? FileError{} : error_of(errno, found->path);
}

void FileEngineCore::close_file(int file) {
  std::shared_ptr<EngineFile> found;
  {
    std::lock_guard lock(mutex_);
    found = file_of(file);
    files_.erase(file);
    backend_->closing(*found);
  }
  ::close(found->buffered);
  if (found->direct >= 0) ::close(found->direct);
}

void FileEngineCore::close() {
  if (closed_) return;
  while (!wait_idle(std::chrono::milliseconds(1000))) {
  }
  std::vector<int> open;
  {
    std::lock_guard lock(mutex_);
    closed_ = true;
    for (const auto& [number, file] : files_) open.push_back(number);
  }
  for (int number : open) close_file(number);
  backend_.reset();
}

void FileEngineCore::register_buffer(char* address, std::size_t bytes) {
  std::lock_guard lock(mutex_);
  buffers_.emplace_back(address, bytes);
  if (in_flight_ == 0) backend_->register_buffers(buffers_);
}

bool FileEngineCore::unregister_buffers() {
  std::lock_guard lock(mutex_);
  if (in_flight_) return false;
  buffers_.clear();
  backend_->register_buffers(buffers_);
  return true;
}

std::size_t FileEngineCore::in_flight() {
  std::lock_guard lock(mutex_);
  return in_flight_;
}

void FileEngineCore::inject(const std::string& operation, std::uint64_t after, int error,
                            std::uint64_t count) {
  if (operation != "read" && operation != "write" && operation != "sync" && operation != "open") {
    throw std::invalid_argument("operation \"" + operation +
                                "\": allowed are read, write, sync and open");
  }
  std::lock_guard lock(mutex_);
  faults_[operation] = {after, count, error};
}

std::map<std::string, std::uint64_t> FileEngineCore::statistics() {
  std::lock_guard lock(mutex_);
  std::map<std::string, std::uint64_t> found;
  for (const char* name : {"bytes_read", "bytes_written", "direct_bytes_read",
                           "direct_bytes_written", "requests", "busy_ns"}) {
    found[name] = counts_[name];
  }
  if (in_flight_) {
    const auto busy = std::chrono::steady_clock::now() - busy_since_;
    found["busy_ns"] += static_cast<std::uint64_t>(
        std::chrono::duration_cast<std::chrono::nanoseconds>(busy).count());
  }
  return found;
}

}  // namespace holdfast
