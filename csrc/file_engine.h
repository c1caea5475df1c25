// Asynchronous reads and writes of files: requests are cut into pieces that a backend (io_uring, or threads
// that call pread and pwrite) carries out in parallel. Needs no Python; safe to use from several threads.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

namespace holdfast {

// An error of a file.
struct FileError {
  int code = 0;
  std::string message;
  std::string path;
};

// The error of a system call, by its errno.
FileError error_of(int code, const std::string& path);

struct EngineFile {
  std::string path;
  int buffered = -1;
  int direct = -1;
  int slot = -1;  // in a backend's table of registered files
  std::size_t in_flight = 0;
};

struct EngineRequest {
  std::shared_ptr<EngineFile> file;
  bool write = false;
  std::uint64_t offset = 0;
  std::size_t bytes = 0;
  std::size_t unfinished = 0;  // pieces
  FileError error;
};

// The bytes that a backend transfers at a time.
struct EnginePiece {
  std::shared_ptr<EngineRequest> request;
  char* address = nullptr;
  std::uint64_t offset = 0;
  std::size_t bytes = 0;
  bool direct = false;
  int buffer = -1;             // registered buffer that it lies in
  std::size_t limit = 0;       // of the first transfer, when a test asks for a short one
};

class FileEngineCore;

class FileBackend {
 public:
  virtual ~FileBackend() = default;
  virtual const char* name() const = 0;
  // Take over pieces; each comes back through FileEngineCore::finished.
  virtual void submit(std::vector<EnginePiece*> pieces) = 0;
  virtual void register_buffers(const std::vector<std::pair<char*, std::size_t>>&) {}
  virtual void opened(EngineFile&) {}
  virtual void closing(EngineFile&) {}
};

std::unique_ptr<FileBackend> make_thread_backend(FileEngineCore& core, int threads);
// Null, with the reason, where the kernel does not offer io_uring.
std::unique_ptr<FileBackend> make_uring_backend(FileEngineCore& core, unsigned depth,
                                                bool background, std::string& reason);

class FileEngineCore {
 public:
  static constexpr std::size_t kBlock = 4096;
  static constexpr std::size_t kPiece = 1 << 20;

  // Without `direct`, the environment variable HOLDFAST_FILE_DIRECT decides.
  FileEngineCore(const std::string& kind, unsigned queue_depth, int threads,
                 std::optional<bool> direct, bool background);
  ~FileEngineCore();

  const char* kind() const { return backend_->name(); }
  int open(const std::string& path, bool write, bool create, bool truncate, std::int64_t size,
           FileError& error);
  bool is_direct(int file);
  // A ticket; its pieces wait for `push`.
  std::uint64_t request(bool write, int file, char* address, std::uint64_t offset,
                        std::size_t bytes, std::vector<EnginePiece*>& pieces);
  // Hand pieces over while there is room; true when all are.
  bool push(std::vector<EnginePiece*>& pieces, std::chrono::milliseconds slice);
  void abandon(std::vector<EnginePiece*>& pieces);
  bool done(std::uint64_t ticket);
  // True when finished within the slice; `error` is set, and the ticket forgotten, then.
  bool wait(std::uint64_t ticket, std::chrono::milliseconds slice, FileError& error);
  // True when no request is unfinished.
  bool wait_idle(std::chrono::milliseconds slice);
  FileError take_first_error();
  bool wait_file(int file, std::chrono::milliseconds slice);
  FileError sync(int file);
  void close_file(int file);
  void close();
  void register_buffer(char* address, std::size_t bytes);
  bool unregister_buffers();
  std::size_t in_flight();
  void inject(const std::string& operation, std::uint64_t after, int error, std::uint64_t count);
  std::map<std::string, std::uint64_t> statistics();

  // For backends: `result` is what the system call gave, an error as its negative code.
  void finished(EnginePiece* piece, std::int64_t result);
  pid_t process() const { return process_; }

 private:
  struct Fault {
    std::uint64_t after = 0, count = 0;
    int error = 0;
  };

  std::shared_ptr<EngineFile> file_of(int file);
  bool take_fault(const std::string& operation, int& error);
  void cut(const std::shared_ptr<EngineRequest>& request, char* address,
           std::vector<EnginePiece*>& pieces);
  void add_pieces(const std::shared_ptr<EngineRequest>& request, char* address,
                  std::uint64_t offset, std::size_t bytes, bool direct,
                  std::vector<EnginePiece*>& pieces);
  int buffer_of(const char* address, std::size_t bytes) const;
  void conclude(EnginePiece* piece, const FileError& error);

  std::mutex mutex_;
  std::condition_variable progress_;
  std::map<int, std::shared_ptr<EngineFile>> files_;
  std::map<std::uint64_t, std::shared_ptr<EngineRequest>> tickets_;
  std::vector<std::pair<char*, std::size_t>> buffers_;
  std::map<std::string, Fault> faults_;
  std::map<std::string, std::uint64_t> counts_;
  std::chrono::steady_clock::time_point busy_since_;
  std::size_t in_flight_ = 0;
  unsigned depth_;
  bool allow_direct_;
  bool closed_ = false;
  int next_file_ = 0;
  std::uint64_t next_ticket_ = 1;
  pid_t process_;
  std::unique_ptr<FileBackend> backend_;
};

}  // namespace holdfast
