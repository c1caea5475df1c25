#include "file_engine.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

namespace holdfast {

namespace {

FileError error_of(int code, const std::string& path) {
  return {code, std::strerror(code), path};
}

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

int FileEngineCore::buffer_of(const char* address, std::size_t bytes) const {
  for (std::size_t i = 0; i < buffers_.size(); ++i) {
    const auto& [begin, size] = buffers_[i];
    if (address >= begin && address + bytes <= begin + size) return static_cast<int>(i);
  }
  return -1;
}

void FileEngineCore::add_pieces(const std::shared_ptr<EngineRequest>& request, char* address,
                                std::uint64_t offset, std::size_t bytes, bool direct,
                                std::vector<EnginePiece*>& pieces) {
  for (std::size_t done = 0; done < bytes; done += kPiece) {
    auto* piece = new EnginePiece;
    piece->request = request;
    piece->address = address + done;
    piece->offset = offset + done;
    piece->bytes = std::min(kPiece, bytes - done);
    piece->direct = direct;
    piece->buffer = buffer_of(piece->address, piece->bytes);
    pieces.push_back(piece);
    ++request->unfinished;
  }
}

// Whole blocks go past the page cache where memory and file are equally aligned; the rest through it.
void FileEngineCore::cut(const std::shared_ptr<EngineRequest>& request, char* address,
                         std::vector<EnginePiece*>& pieces) {
  const std::uint64_t begin = request->offset, end = begin + request->bytes;
  const std::uint64_t first = (begin + kBlock - 1) / kBlock * kBlock, last = end / kBlock * kBlock;
  const bool aligned = reinterpret_cast<std::uintptr_t>(address) % kBlock == begin % kBlock;
  if (request->file->direct < 0 || !aligned || first >= last) {
    add_pieces(request, address, begin, request->bytes, false, pieces);
    return;
  }
  add_pieces(request, address, begin, first - begin, false, pieces);
  add_pieces(request, address + (first - begin), first, last - first, true, pieces);
  add_pieces(request, address + (last - begin), last, end - last, false, pieces);
}

std::uint64_t FileEngineCore::request(bool write, int file, char* address, std::uint64_t offset,
                                      std::size_t bytes, std::vector<EnginePiece*>& pieces) {
  std::lock_guard lock(mutex_);
  if (closed_) throw std::invalid_argument("the file engine is closed");
  auto request = std::make_shared<EngineRequest>();
  request->file = file_of(file);
  request->write = write;
  request->offset = offset;
  request->bytes = bytes;
  cut(request, address, pieces);
  request->file->in_flight += request->unfinished;
  const std::uint64_t ticket = next_ticket_++;
  tickets_[ticket] = request;
  ++counts_["requests"];
  return ticket;
}

bool FileEngineCore::push(std::vector<EnginePiece*>& pieces, std::chrono::milliseconds slice) {
  std::vector<EnginePiece*> ready;
  bool all = false;
  {
    std::unique_lock lock(mutex_);
    progress_.wait_for(lock, slice, [&] { return in_flight_ < depth_ || pieces.empty(); });
    std::size_t taken = 0;
    while (taken < pieces.size() && in_flight_ < depth_) {
      EnginePiece* piece = pieces[taken++];
      if (in_flight_++ == 0) busy_since_ = std::chrono::steady_clock::now();
      int code = 0;
      if (take_fault(piece->request->write ? "write" : "read", code)) {
        if (code) {
          conclude(piece, error_of(code, piece->request->file->path));
          continue;
        }
        piece->limit = (piece->bytes + 1) / 2;
      }
      ready.push_back(piece);
    }
    pieces.erase(pieces.begin(), pieces.begin() + static_cast<std::ptrdiff_t>(taken));
    all = pieces.empty();
  }
  if (!ready.empty()) backend_->submit(std::move(ready));
  return all;
}

void FileEngineCore::abandon(std::vector<EnginePiece*>& pieces) {
  std::lock_guard lock(mutex_);
  for (EnginePiece* piece : pieces) {
    ++in_flight_;
    conclude(piece, error_of(ECANCELED, piece->request->file->path));
  }
  pieces.clear();
}

// The caller holds the mutex.
void FileEngineCore::conclude(EnginePiece* piece, const FileError& error) {
  EngineRequest& request = *piece->request;
  if (error.code && !request.error.code) request.error = error;
  --request.unfinished;
  --request.file->in_flight;
  if (--in_flight_ == 0) {
    const auto busy = std::chrono::steady_clock::now() - busy_since_;
    counts_["busy_ns"] += static_cast<std::uint64_t>(
        std::chrono::duration_cast<std::chrono::nanoseconds>(busy).count());
  }
  delete piece;
  progress_.notify_all();
}

void FileEngineCore::finished(EnginePiece* piece, std::int64_t result) {
  const EngineRequest& request = *piece->request;
  FileError error;
  if (result == -EINTR || result == -EAGAIN) {
    backend_->submit({piece});
    return;
  }
  if (result == -EINVAL && piece->direct) {
    // This filesystem opens files for direct I/O and then refuses it.
    piece->direct = false;
    backend_->submit({piece});
    return;
  }
  if (result < 0) {
    error = error_of(static_cast<int>(-result), request.file->path);
  } else if (result == 0 && piece->bytes > 0) {
    error = {EIO,
             "the file ends at byte " + std::to_string(piece->offset) + ", wanted up to " +
                 std::to_string(request.offset + request.bytes),
             request.file->path};
    if (request.write) error.message = "nothing could be written";
  } else {
    const auto moved = static_cast<std::size_t>(result);
    piece->address += moved;
    piece->offset += moved;
    piece->bytes -= moved;
    {
      std::lock_guard lock(mutex_);
      counts_[request.write ? "bytes_written" : "bytes_read"] += moved;
      if (piece->direct) {
        counts_[request.write ? "direct_bytes_written" : "direct_bytes_read"] += moved;
      }
    }
    if (piece->bytes > 0) {
      piece->limit = 0;
      if (moved % kBlock) piece->direct = false;
      backend_->submit({piece});
      return;
    }
  }
  std::lock_guard lock(mutex_);
  conclude(piece, error);
}

bool FileEngineCore::done(std::uint64_t ticket) {
  std::lock_guard lock(mutex_);
  auto found = tickets_.find(ticket);
  if (found == tickets_.end()) {
    throw std::invalid_argument("ticket " + std::to_string(ticket) + " is not in use");
  }
  return found->second->unfinished == 0;
}

bool FileEngineCore::wait(std::uint64_t ticket, std::chrono::milliseconds slice,
                          FileError& error) {
  std::unique_lock lock(mutex_);
  auto found = tickets_.find(ticket);
  if (found == tickets_.end()) {
    throw std::invalid_argument("ticket " + std::to_string(ticket) + " is not in use");
  }
  auto request = found->second;
  if (!progress_.wait_for(lock, slice, [&] { return request->unfinished == 0; })) return false;
  error = request->error;
  tickets_.erase(ticket);
  return true;
}

bool FileEngineCore::wait_idle(std::chrono::milliseconds slice) {
  std::unique_lock lock(mutex_);
  return progress_.wait_for(lock, slice, [&] {
    for (const auto& [number, file] : files_) {
      if (file->in_flight) return false;
    }
    return true;
  });
}

FileError FileEngineCore::take_first_error() {
  std::lock_guard lock(mutex_);
  FileError first;
  for (const auto& [ticket, request] : tickets_) {
    if (request->error.code && !first.code) first = request->error;
  }
  tickets_.clear();
  return first;
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
