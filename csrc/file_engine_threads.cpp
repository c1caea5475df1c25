// The engine for every kernel and filesystem: threads that call pread and pwrite.
#include <unistd.h>

#include <cerrno>
#include <deque>
#include <thread>

#include "file_engine.h"

namespace holdfast {
namespace {

class ThreadBackend final : public FileBackend {
 public:
  ThreadBackend(FileEngineCore& core, int threads) : core_(core) {
    for (int i = 0; i < threads; ++i) threads_.emplace_back([this] { work(); });
  }

  ~ThreadBackend() override {
    {
      std::lock_guard lock(mutex_);
      ending_ = true;
    }
    waiting_.notify_all();
    for (auto& thread : threads_) thread.join();
  }

  const char* name() const override { return "threads"; }

  void submit(std::vector<EnginePiece*> pieces) override {
    {
      std::lock_guard lock(mutex_);
      queue_.insert(queue_.end(), pieces.begin(), pieces.end());
    }
    pieces.size() == 1 ? waiting_.notify_one() : waiting_.notify_all();
  }

 private:
  void work() {
    for (;;) {
      EnginePiece* piece;
      {
        std::unique_lock lock(mutex_);
        waiting_.wait(lock, [&] { return ending_ || !queue_.empty(); });
        if (queue_.empty()) return;
        piece = queue_.front();
        queue_.pop_front();
      }
      const EngineFile& file = *piece->request->file;
      const int descriptor = piece->direct ? file.direct : file.buffered;
      const std::size_t bytes = piece->limit ? piece->limit : piece->bytes;
      const auto offset = static_cast<off_t>(piece->offset);
      const ssize_t moved = piece->request->write
                                ? pwrite(descriptor, piece->address, bytes, offset)
                                : pread(descriptor, piece->address, bytes, offset);
      core_.finished(piece, moved < 0 ? -errno : moved);
    }
  }

  FileEngineCore& core_;
  std::mutex mutex_;
  std::condition_variable waiting_;
  std::deque<EnginePiece*> queue_;
  std::vector<std::thread> threads_;
  bool ending_ = false;
};

}  // namespace

std::unique_ptr<FileBackend> make_thread_backend(FileEngineCore& core, int threads) {
  return std::make_unique<ThreadBackend>(core, threads);
}

}  // namespace holdfast
