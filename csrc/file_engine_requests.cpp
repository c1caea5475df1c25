// A request: it is cut into pieces, handed to the backend, concluded and waited for.
#include <algorithm>
#include <cerrno>
#include <stdexcept>

#include "file_engine.h"

namespace holdfast {

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
    // Some filesystems open files for direct I/O and then refuse it.
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

}  // namespace holdfast
