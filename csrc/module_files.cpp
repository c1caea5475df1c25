// The file engine as a Python class: every wait is without the GIL, in slices that signals interrupt.
#include <nanobind/nanobind.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>
#include <unistd.h>

#include <tuple>

#include "file_engine.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace holdfast {
namespace {

constexpr std::chrono::milliseconds kSlice{100};

[[noreturn]] void raise(const FileError& error) {
  nb::object arguments = nb::make_tuple(error.code, error.message, error.path);
  PyErr_SetObject(PyExc_OSError, arguments.ptr());
  throw nb::python_error();
}

void check(const FileError& error) {
  if (error.code) raise(error);
}

// Calls `step` without the GIL until it is true; false when `timeout_s` (none if negative) is over.
template <class Step>
bool wait_until(Step step, double timeout_s) {
  const auto begin = std::chrono::steady_clock::now();
  for (;;) {
    auto slice = kSlice;
    if (timeout_s >= 0) {
      const std::chrono::duration<double> spent = std::chrono::steady_clock::now() - begin;
      const double left = (timeout_s - spent.count()) * 1000;
      slice = std::min(slice, std::chrono::milliseconds(left > 0 ? static_cast<int>(left) + 1 : 0));
    }
    bool finished;
    {
      nb::gil_scoped_release unlocked;
      finished = step(slice);
    }
    if (finished) return true;
    if (PyErr_CheckSignals() != 0) throw nb::python_error();
    const std::chrono::duration<double> spent = std::chrono::steady_clock::now() - begin;
    if (timeout_s >= 0 && spent.count() >= timeout_s) return false;
  }
}

class FileEngine {
 public:
  FileEngine(const std::string& kind, unsigned queue_depth, int threads,
             std::optional<bool> direct, bool background)
      : core_(new FileEngineCore(kind, queue_depth, threads, direct, background)) {}

  FileEngine(const FileEngine&) = delete;
  FileEngine& operator=(const FileEngine&) = delete;

  // A fork's copy is left alone: the threads that it would wait for are not in the child.
  ~FileEngine() {
    if (getpid() != core_->process()) return;
    nb::gil_scoped_release unlocked;
    delete core_;
  }

  std::string kind() { return core().kind(); }

  void register_buffer(std::uintptr_t address, std::size_t bytes) {
    core().register_buffer(reinterpret_cast<char*>(address), bytes);
  }

  void unregister_buffers() {
    if (!core().unregister_buffers()) {
      throw std::runtime_error("buffers cannot be unregistered while requests are in flight");
    }
  }

  int open(const std::string& path, bool write, bool create, bool truncate, std::int64_t size) {
    FileError error;
    int file;
    {
      FileEngineCore& engine = core();
      nb::gil_scoped_release unlocked;
      file = engine.open(path, write, create, truncate, size, error);
    }
    check(error);
    return file;
  }

  bool direct(int file) { return core().is_direct(file); }

  std::uint64_t transfer(bool write, int file, std::uintptr_t address, std::int64_t offset,
                         std::int64_t bytes) {
    std::vector<EnginePiece*> pieces;
    const std::uint64_t ticket = cut(write, file, address, offset, bytes, pieces);
    push(pieces);
    return ticket;
  }

  std::vector<std::uint64_t> submit(
      const std::vector<std::tuple<bool, int, std::uintptr_t, std::int64_t, std::int64_t>>&
          requests) {
    std::vector<std::uint64_t> tickets;
    std::vector<EnginePiece*> pieces;
    try {
      for (const auto& [write, file, address, offset, bytes] : requests) {
        tickets.push_back(cut(write, file, address, offset, bytes, pieces));
      }
    } catch (...) {
      core().abandon(pieces);
      throw;
    }
    push(pieces);
    return tickets;
  }

  bool done(std::uint64_t ticket) { return core().done(ticket); }

  bool wait(std::uint64_t ticket, double timeout_s) {
    FileError error;
    FileEngineCore& engine = core();
    const bool finished =
        wait_until([&](auto slice) { return engine.wait(ticket, slice, error); }, timeout_s);
    check(error);
    return finished;
  }

  bool wait_all(double timeout_s) {
    FileEngineCore& engine = core();
    if (!wait_until([&](auto slice) { return engine.wait_idle(slice); }, timeout_s)) return false;
    check(engine.take_first_error());
    return true;
  }

  void sync(int file) {
    FileEngineCore& engine = core();
    wait_until([&](auto slice) { return engine.wait_file(file, slice); }, -1);
    FileError error;
    {
      nb::gil_scoped_release unlocked;
      error = engine.sync(file);
    }
    check(error);
  }

  void close_file(int file) {
    FileEngineCore& engine = core();
    wait_until([&](auto slice) { return engine.wait_file(file, slice); }, -1);
    engine.close_file(file);
  }

  void close() {
    FileEngineCore& engine = core();
    nb::gil_scoped_release unlocked;
    engine.close();
  }

  std::size_t in_flight() { return core().in_flight(); }

  void inject(const std::string& operation, std::uint64_t after, int error, std::uint64_t count) {
    core().inject(operation, after, error, count);
  }

  std::map<std::string, std::uint64_t> statistics() { return core().statistics(); }

 private:
  FileEngineCore& core() {
    if (getpid() != core_->process()) {
      throw std::runtime_error(
          "this file engine was made before a fork; make one in the process that uses it");
    }
    return *core_;
  }

  std::uint64_t cut(bool write, int file, std::uintptr_t address, std::int64_t offset,
                    std::int64_t bytes, std::vector<EnginePiece*>& pieces) {
    if (offset < 0 || bytes < 0) {
      throw std::invalid_argument("offset and nbytes of a request must be 0 or more");
    }
    return core().request(write, file, reinterpret_cast<char*>(address),
                          static_cast<std::uint64_t>(offset), static_cast<std::size_t>(bytes),
                          pieces);
  }

  void push(std::vector<EnginePiece*>& pieces) {
    FileEngineCore& engine = core();
    try {
      wait_until([&](auto slice) { return engine.push(pieces, slice); }, -1);
    } catch (...) {
      engine.abandon(pieces);
      throw;
    }
  }

  FileEngineCore* core_;
};

}  // namespace

void define_file_engine(nb::module_& module) {
  nb::class_<FileEngine>(module, "FileEngine")
      .def(nb::init<const std::string&, unsigned, int, std::optional<bool>, bool>(), nb::kw_only(),
           "kind"_a = "auto", "queue_depth"_a = 64, "threads"_a = 4, "direct"_a = nb::none(),
           "background"_a = false)
      .def_prop_ro("kind", &FileEngine::kind)
      .def_prop_ro("in_flight", &FileEngine::in_flight)
      .def("register_buffer", &FileEngine::register_buffer, "address"_a, "nbytes"_a)
      .def("unregister_buffers", &FileEngine::unregister_buffers)
      .def("open", &FileEngine::open, "path"_a, nb::kw_only(), "write"_a = false,
           "create"_a = false, "truncate"_a = false, "size"_a = -1)
      .def("direct", &FileEngine::direct, "file"_a)
      .def(
          "write",
          [](FileEngine& engine, int file, std::uintptr_t address, std::int64_t offset,
             std::int64_t bytes) { return engine.transfer(true, file, address, offset, bytes); },
          "file"_a, "address"_a, "offset"_a, "nbytes"_a)
      .def(
          "read",
          [](FileEngine& engine, int file, std::uintptr_t address, std::int64_t offset,
             std::int64_t bytes) { return engine.transfer(false, file, address, offset, bytes); },
          "file"_a, "address"_a, "offset"_a, "nbytes"_a)
      .def("submit", &FileEngine::submit, "requests"_a)
      .def("done", &FileEngine::done, "ticket"_a)
      .def("wait", &FileEngine::wait, "ticket"_a, "timeout_s"_a = -1.0)
      .def("wait_all", &FileEngine::wait_all, "timeout_s"_a = -1.0)
      .def("sync", &FileEngine::sync, "file"_a)
      .def("close_file", &FileEngine::close_file, "file"_a)
      .def("close", &FileEngine::close)
      .def("inject", &FileEngine::inject, "operation"_a, "after"_a, "error"_a, "count"_a = 1)
      .def("statistics", &FileEngine::statistics)
      .def("__enter__", [](nb::object self) { return self; })
      .def("__exit__",
           [](FileEngine& engine, nb::args) { engine.close(); });
}

}  // namespace holdfast
