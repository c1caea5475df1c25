// The engine over io_uring (Axboe 2019), by its system calls: one ring, one thread that reaps completions.
#include "file_engine.h"

#if __has_include(<linux/io_uring.h>)

#include <linux/io_uring.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <thread>

namespace holdfast {
namespace {

constexpr int kRegisteredFiles = 256;

int ring_setup(unsigned entries, io_uring_params* params) {
  return static_cast<int>(syscall(__NR_io_uring_setup, entries, params));
}

int ring_enter(int ring, unsigned submit, unsigned complete, unsigned flags) {
  return static_cast<int>(
      syscall(__NR_io_uring_enter, ring, submit, complete, flags, nullptr, 0));
}

int ring_register(int ring, unsigned code, const void* argument, unsigned count) {
  return static_cast<int>(syscall(__NR_io_uring_register, ring, code, argument, count));
}

class Mapping {
 public:
  Mapping(int ring, std::size_t bytes, off_t what) : bytes_(bytes) {
    address_ = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, ring, what);
  }
  ~Mapping() {
    if (valid()) munmap(address_, bytes_);
  }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  bool valid() const { return address_ != MAP_FAILED; }
  template <class Value>
  Value* at(std::size_t offset) const {
    return reinterpret_cast<Value*>(static_cast<char*>(address_) + offset);
  }

 private:
  void* address_;
  std::size_t bytes_;
};

class UringBackend final : public FileBackend {
 public:
  UringBackend(FileEngineCore& core, int ring, const io_uring_params& params, bool background)
      : core_(core),
        ring_(ring),
        background_(background),
        submission_(ring, params.sq_off.array + params.sq_entries * sizeof(unsigned),
                    IORING_OFF_SQ_RING),
        completion_(ring, params.cq_off.cqes + params.cq_entries * sizeof(io_uring_cqe),
                    IORING_OFF_CQ_RING),
        entries_(ring, params.sq_entries * sizeof(io_uring_sqe), IORING_OFF_SQES),
        slots_(kRegisteredFiles / 2, false) {
    if (!valid()) return;
    sq_head_ = submission_.at<unsigned>(params.sq_off.head);
    sq_tail_ = submission_.at<unsigned>(params.sq_off.tail);
    sq_mask_ = *submission_.at<unsigned>(params.sq_off.ring_mask);
    sq_array_ = submission_.at<unsigned>(params.sq_off.array);
    cq_head_ = completion_.at<unsigned>(params.cq_off.head);
    cq_tail_ = completion_.at<unsigned>(params.cq_off.tail);
    cq_mask_ = *completion_.at<unsigned>(params.cq_off.ring_mask);
    cqes_ = completion_.at<io_uring_cqe>(params.cq_off.cqes);
    sqes_ = entries_.at<io_uring_sqe>(0);
    std::vector<int> none(kRegisteredFiles, -1);
    files_registered_ =
        ring_register(ring_, IORING_REGISTER_FILES, none.data(), kRegisteredFiles) == 0;
    reaper_ = std::thread([this] { reap(); });
  }

  ~UringBackend() override {
    if (reaper_.joinable()) {
      {
        std::lock_guard lock(mutex_);
        io_uring_sqe* entry = next_entry();
        entry->opcode = IORING_OP_NOP;
        entry->user_data = 0;
        flush();
      }
      reaper_.join();
    }
    ::close(ring_);
  }

  bool valid() const { return submission_.valid() && completion_.valid() && entries_.valid(); }

  const char* name() const override { return "io_uring"; }

  void submit(std::vector<EnginePiece*> pieces) override {
    std::vector<EnginePiece*> refused;
    {
      std::lock_guard lock(mutex_);
      for (EnginePiece* piece : pieces) prepare(piece);
      refused = flush();
    }
    for (EnginePiece* piece : refused) core_.finished(piece, -EIO);
  }

  // A kernel that will not pin the memory (RLIMIT_MEMLOCK) still reads and writes it.
  void register_buffers(const std::vector<std::pair<char*, std::size_t>>& buffers) override {
    std::lock_guard lock(mutex_);
    if (registered_buffers_) ring_register(ring_, IORING_UNREGISTER_BUFFERS, nullptr, 0);
    registered_buffers_ = 0;
    std::vector<iovec> vectors;
    for (const auto& [address, bytes] : buffers) {
      // The kernel takes 1 GiB a buffer at most.
      if (bytes > (std::size_t{1} << 30)) return;
      vectors.push_back({address, bytes});
    }
    if (vectors.empty()) return;
    if (ring_register(ring_, IORING_REGISTER_BUFFERS, vectors.data(),
                      static_cast<unsigned>(vectors.size())) == 0) {
      registered_buffers_ = static_cast<int>(vectors.size());
    }
  }

  void opened(EngineFile& file) override {
    std::lock_guard lock(mutex_);
    if (!files_registered_) return;
    for (std::size_t slot = 0; slot < slots_.size(); ++slot) {
      if (slots_[slot]) continue;
      int descriptors[2] = {file.buffered, file.direct};
      if (update(slot, descriptors)) {
        slots_[slot] = true;
        file.slot = static_cast<int>(slot);
      }
      return;
    }
  }

  void closing(EngineFile& file) override {
    std::lock_guard lock(mutex_);
    if (file.slot < 0) return;
    int descriptors[2] = {-1, -1};
    update(static_cast<std::size_t>(file.slot), descriptors);
    slots_[static_cast<std::size_t>(file.slot)] = false;
    file.slot = -1;
  }

 private:
  bool update(std::size_t slot, int* descriptors) {
    io_uring_files_update change{};
    change.offset = static_cast<unsigned>(2 * slot);
    change.fds = reinterpret_cast<std::uintptr_t>(descriptors);
    return ring_register(ring_, IORING_REGISTER_FILES_UPDATE, &change, 2) == 2;
  }

  // There is always room: the core keeps fewer pieces in flight than the ring has entries.
  io_uring_sqe* next_entry() {
    const unsigned index = (*sq_tail_ + unsubmitted_) & sq_mask_;
    io_uring_sqe* entry = &sqes_[index];
    std::memset(entry, 0, sizeof(*entry));
    sq_array_[index] = index;
    ++unsubmitted_;
    return entry;
  }

  void prepare(EnginePiece* piece) {
    const EngineFile& file = *piece->request->file;
    const bool fixed = piece->buffer >= 0 && piece->buffer < registered_buffers_;
    io_uring_sqe* entry = next_entry();
    if (piece->request->write) {
      entry->opcode = fixed ? IORING_OP_WRITE_FIXED : IORING_OP_WRITE;
    } else {
      entry->opcode = fixed ? IORING_OP_READ_FIXED : IORING_OP_READ;
    }
    if (file.slot >= 0) {
      entry->fd = 2 * file.slot + (piece->direct ? 1 : 0);
      entry->flags = IOSQE_FIXED_FILE;
    } else {
      entry->fd = piece->direct ? file.direct : file.buffered;
    }
    // Through the page cache the kernel would copy within the call that submits; a worker of its own does
    // it, or also pins the memory of direct requests.
    if (background_ || !piece->direct) entry->flags |= IOSQE_ASYNC;
    entry->addr = reinterpret_cast<std::uintptr_t>(piece->address);
    entry->len = static_cast<unsigned>(piece->limit ? piece->limit : piece->bytes);
    entry->off = piece->offset;
    if (fixed) entry->buf_index = static_cast<unsigned short>(piece->buffer);
    entry->user_data = reinterpret_cast<std::uintptr_t>(piece);
  }

  // Gives back the pieces that the kernel would not take.
  std::vector<EnginePiece*> flush() {
    __atomic_store_n(sq_tail_, *sq_tail_ + unsubmitted_, __ATOMIC_RELEASE);
    std::vector<EnginePiece*> refused;
    while (unsubmitted_ > 0) {
      const int taken = ring_enter(ring_, unsubmitted_, 0, 0);
      if (taken > 0) {
        unsubmitted_ -= static_cast<unsigned>(taken);
      } else if (taken == 0 || errno == EINTR || errno == EAGAIN || errno == EBUSY) {
        std::this_thread::yield();
      } else {
        const unsigned head = __atomic_load_n(sq_head_, __ATOMIC_ACQUIRE);
        for (unsigned i = head; i != *sq_tail_; ++i) {
          auto* piece = reinterpret_cast<EnginePiece*>(sqes_[sq_array_[i & sq_mask_]].user_data);
          if (piece) refused.push_back(piece);
        }
        __atomic_store_n(sq_tail_, head, __ATOMIC_RELEASE);
        unsubmitted_ = 0;
      }
    }
    return refused;
  }

  void reap() {
    for (;;) {
      if (ring_enter(ring_, 0, 1, IORING_ENTER_GETEVENTS) < 0 && errno != EINTR) {
        std::this_thread::yield();
      }
      unsigned head = *cq_head_;
      while (head != __atomic_load_n(cq_tail_, __ATOMIC_ACQUIRE)) {
        const io_uring_cqe event = cqes_[head & cq_mask_];
        __atomic_store_n(cq_head_, ++head, __ATOMIC_RELEASE);
        if (event.user_data == 0) return;
        core_.finished(reinterpret_cast<EnginePiece*>(event.user_data), event.res);
      }
    }
  }

  FileEngineCore& core_;
  int ring_;
  bool background_;
  Mapping submission_, completion_, entries_;
  std::vector<bool> slots_;
  unsigned *sq_head_ = nullptr, *sq_tail_ = nullptr, *sq_array_ = nullptr;
  unsigned *cq_head_ = nullptr, *cq_tail_ = nullptr;
  unsigned sq_mask_ = 0, cq_mask_ = 0, unsubmitted_ = 0;
  io_uring_cqe* cqes_ = nullptr;
  io_uring_sqe* sqes_ = nullptr;
  bool files_registered_ = false;
  int registered_buffers_ = 0;
  std::mutex mutex_;
  std::thread reaper_;
};

}  // namespace

std::unique_ptr<FileBackend> make_uring_backend(FileEngineCore& core, unsigned depth,
                                                bool background, std::string& reason) {
  io_uring_params params{};
  // One entry more than pieces in flight: the last ends the reaper.
  const int ring = ring_setup(depth + 1, &params);
  if (ring < 0) {
    reason = std::string("io_uring_setup: ") + std::strerror(errno);
    return nullptr;
  }
  auto backend = std::make_unique<UringBackend>(core, ring, params, background);
  if (!backend->valid()) {
    reason = std::string("the ring cannot be mapped: ") + std::strerror(errno);
    return nullptr;
  }
  return backend;
}

}  // namespace holdfast

#else

namespace holdfast {

std::unique_ptr<FileBackend> make_uring_backend(FileEngineCore&, unsigned, bool, std::string& reason) {
  reason = "built without <linux/io_uring.h>";
  return nullptr;
}

}  // namespace holdfast

#endif
