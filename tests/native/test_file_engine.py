"""The file engine against plain reads and writes: both kinds, direct and not, on a disk and in
memory.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from holdfast import _native

KINDS = ("io_uring", "threads")


def _kinds() -> list[object]:
    found: list[object] = []
    for kind in KINDS:
        try:
            _native.FileEngine(kind=kind).close()
        except RuntimeError as error:
            found.append(pytest.param(kind, marks=pytest.mark.skip(reason=str(error))))
        else:
            found.append(kind)
    return found


class Memory:
    """Page-aligned memory with an address."""

    def __init__(self, nbytes: int) -> None:
        self.bytes = mmap.mmap(-1, max(nbytes, 1))
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.bytes))


@pytest.fixture(params=_kinds())
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=["disk", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    if request.param == "disk":
        yield tmp_path
        return
    path = Path("/dev/shm") / f"holdfast-test-{os.getpid()}"
    path.mkdir()
    yield path
    subprocess.run(["rm", "-r", str(path)], check=True)


@pytest.mark.mp
@pytest.mark.parametrize("direct", [True, False])
def test_what_is_written_is_read_by_others_and_back(kind: str, direct: bool, folder: Path) -> None:
    content = os.urandom(5_000_017)
    source, back = Memory(len(content) + 8192), Memory(len(content) + 8192)
    with _native.FileEngine(kind=kind, direct=direct) as engine:
        assert engine.kind == kind
        for shift, offset in ((0, 0), (0, 4096), (17, 17), (17, 3), (4095, 8191)):
            path = folder / f"file-{shift}-{offset}"
            source.bytes[shift : shift + len(content)] = content
            file = engine.open(str(path), write=True, create=True)
            engine.wait(engine.write(file, source.address + shift, offset, len(content)))
            engine.sync(file)
            assert path.read_bytes()[offset:] == content
            back.bytes[:] = bytes(len(back.bytes))
            engine.wait(engine.read(file, back.address + shift, offset, len(content)))
            assert back.bytes[shift : shift + len(content)] == content
            assert back.bytes[shift + len(content)] == 0
            engine.close_file(file)
        numbers = engine.statistics()
        assert numbers["bytes_written"] == numbers["bytes_read"] == 5 * len(content)
        if not direct:
            assert numbers["direct_bytes_written"] == 0


def test_an_explicit_choice_beats_the_environment_for_direct_requests(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def takes_direct(direct: bool | None) -> bool:
        with _native.FileEngine(kind=kind, direct=direct) as engine:
            return engine.direct(engine.open(str(tmp_path / "file"), write=True, create=True))

    monkeypatch.delenv("HOLDFAST_FILE_DIRECT", raising=False)
    if not takes_direct(True):
        pytest.skip("this filesystem takes no direct requests")
    assert takes_direct(None)
    assert not takes_direct(False)
    monkeypatch.setenv("HOLDFAST_FILE_DIRECT", "0")
    assert takes_direct(True)
    assert not takes_direct(None)


def test_requests_can_be_begun_beside_the_caller(kind: str, tmp_path: Path) -> None:
    content = os.urandom(4 << 20)
    memory, back = Memory(len(content)), Memory(len(content))
    memory.bytes[:] = content
    with _native.FileEngine(kind=kind, background=True, queue_depth=2) as engine:
        file = engine.open(str(tmp_path / "file"), write=True, create=True, size=len(content))
        engine.wait(engine.write(file, memory.address, 0, len(content)))
        engine.wait(engine.read(file, back.address, 0, len(content)))
        assert back.bytes[:] == content
        assert engine.statistics()["busy_ns"] > 0


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    requests=st.lists(
        st.tuples(st.integers(0, 9000), st.integers(0, 40_000), st.integers(0, 20_000)), max_size=12
    ),
    direct=st.booleans(),
)
def test_any_requests_give_what_plain_python_gives(
    kind: str, tmp_path: Path, requests: list[tuple[int, int, int]], direct: bool
) -> None:
    path = tmp_path / "file"
    source = Memory(30_000)
    source.bytes[:] = os.urandom(30_000)
    expected = bytearray(60_000)
    with _native.FileEngine(kind=kind, direct=direct, queue_depth=4) as engine:
        file = engine.open(str(path), write=True, create=True, truncate=True, size=60_000)
        for shift, offset, length in requests:
            engine.wait(engine.write(file, source.address + shift, offset, length))
            expected[offset : offset + length] = source.bytes[shift : shift + length]
        assert path.read_bytes() == expected
        for shift, offset, length in requests:
            back = Memory(30_000)
            engine.wait(engine.read(file, back.address + shift, offset, length))
            assert back.bytes[shift : shift + length] == expected[offset : offset + length]


def test_many_requests_at_once_are_all_carried_out(kind: str, tmp_path: Path) -> None:
    count, size = 3000, 1000
    content = os.urandom(count * size)
    memory, back = Memory(len(content)), Memory(len(content))
    memory.bytes[: len(content)] = content
    with _native.FileEngine(kind=kind, queue_depth=8) as engine:
        engine.register_buffer(memory.address, len(content))
        file = engine.open(str(tmp_path / "file"), write=True, create=True, size=len(content))
        tickets = engine.submit(
            [(True, file, memory.address + i * size, i * size, size) for i in range(count)]
        )
        assert len(set(tickets)) == count
        assert engine.in_flight <= 8
        engine.wait_all()
        engine.submit(
            [(False, file, back.address + i * size, i * size, size) for i in range(count)]
        )
        engine.wait_all()
        assert back.bytes[: len(content)] == content
        engine.unregister_buffers()


def test_threads_share_an_engine(kind: str, tmp_path: Path) -> None:
    failures: list[BaseException] = []
    with _native.FileEngine(kind=kind, queue_depth=4) as engine:

        def work(number: int) -> None:
            try:
                memory = Memory(1 << 20)
                memory.bytes[:] = bytes([number]) * (1 << 20)
                file = engine.open(str(tmp_path / str(number)), write=True, create=True)
                for block in range(8):
                    engine.wait(engine.write(file, memory.address, block << 20, 1 << 20))
                engine.close_file(file)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures
    for number in range(4):
        assert (tmp_path / str(number)).read_bytes() == bytes([number]) * (8 << 20)


def test_a_read_past_the_end_names_file_and_byte(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "short"
    path.write_bytes(bytes(5000))
    memory = Memory(8192)
    with _native.FileEngine(kind=kind) as engine:
        file = engine.open(str(path))
        ticket = engine.read(file, memory.address, 0, 8192)
        with pytest.raises(OSError, match="ends at byte 5000, wanted up to 8192") as caught:
            engine.wait(ticket)
        assert caught.value.filename == str(path)
        with pytest.raises(ValueError, match="not in use"):
            engine.wait(ticket)


def test_errors_of_the_system_come_back(kind: str, tmp_path: Path) -> None:
    memory = Memory(4096)
    with _native.FileEngine(kind=kind) as engine:
        with pytest.raises(FileNotFoundError) as missing:
            engine.open(str(tmp_path / "none"))
        assert missing.value.filename == str(tmp_path / "none")
        path = tmp_path / "read-only"
        path.write_bytes(bytes(4096))
        file = engine.open(str(path))
        with pytest.raises(OSError, match="Bad file descriptor") as caught:
            engine.wait(engine.write(file, memory.address, 0, 4096))
        assert caught.value.errno == errno.EBADF
        full = engine.open("/dev/full", write=True)
        with pytest.raises(OSError, match="No space left"):
            engine.wait(engine.write(full, memory.address, 0, 100))
        with pytest.raises(ValueError, match="not open"):
            engine.write(99, memory.address, 0, 1)
        with pytest.raises(ValueError, match="0 or more"):
            engine.write(file, memory.address, -1, 1)


@pytest.mark.mp
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small filesystem needs root")
def test_a_full_filesystem_is_enospc(kind: str, tmp_path: Path) -> None:
    mount = tmp_path / "small"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(mount)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not allowed here")
    memory = Memory(4 << 20)
    try:
        with _native.FileEngine(kind=kind) as engine:
            with pytest.raises(OSError, match="No space left"):
                engine.open(str(mount / "large"), write=True, create=True, size=4 << 20)
            file = engine.open(str(mount / "grows"), write=True, create=True)
            with pytest.raises(OSError, match="No space left"):
                engine.wait(engine.write(file, memory.address, 0, 4 << 20))
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_injected_faults(kind: str, tmp_path: Path) -> None:
    content = os.urandom(3 << 20)
    memory = Memory(len(content))
    memory.bytes[:] = content
    path = tmp_path / "file"
    with _native.FileEngine(kind=kind) as engine:
        file = engine.open(str(path), write=True, create=True)
        engine.inject("write", 0, 0, 3)
        engine.wait(engine.write(file, memory.address, 0, len(content)))
        assert path.read_bytes() == content
        engine.inject("write", 1, errno.EIO)
        first = engine.write(file, memory.address, 0, 1 << 20)
        second = engine.write(file, memory.address, 1 << 20, 1 << 20)
        assert engine.wait(first)
        with pytest.raises(OSError, match="Input/output error"):
            engine.wait(second)
        engine.inject("sync", 0, errno.EIO)
        with pytest.raises(OSError, match="Input/output error"):
            engine.sync(file)
        engine.sync(file)
        engine.inject("open", 0, errno.EMFILE)
        with pytest.raises(OSError, match="Too many open files"):
            engine.open(str(path))
        with pytest.raises(ValueError, match="allowed are"):
            engine.inject("rename", 0, 1)


def test_waiting_leaves_the_interpreter_free_and_obeys_signals(kind: str) -> None:
    """A read from an empty pipe never ends by itself: only a real wait can be interrupted."""
    reading, writing = os.pipe()
    memory = Memory(4096)
    counted = 0
    stop = threading.Event()

    def count() -> None:
        nonlocal counted
        while not stop.is_set():
            counted += 1
            time.sleep(0.001)

    thread = threading.Thread(target=count)
    engine = _native.FileEngine(kind=kind)
    file = engine.open(f"/proc/self/fd/{reading}")
    ticket = engine.read(file, memory.address, 0, 16)
    thread.start()
    before = counted
    try:
        ended = engine.wait(ticket, 1.0)
    except OSError as error:
        if error.errno != errno.ESPIPE:  # an offset of 0 is refused for a pipe, sooner or later
            raise
        ended = True
    handler = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # some shells have it ignored
    try:
        if ended:
            pytest.skip("this kernel refuses positioned reads from a pipe")
        assert counted > before
        timer = threading.Timer(0.2, signal.raise_signal, (signal.SIGINT,))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            engine.wait(ticket)
    finally:
        signal.signal(signal.SIGINT, handler)
        stop.set()
        thread.join()
        if not ended:  # else the engine would wait for the read without end
            os.write(writing, bytes(16))
            engine.wait(ticket)
        engine.close()


@pytest.mark.mp
def test_an_engine_does_not_survive_a_fork(kind: str, tmp_path: Path) -> None:
    engine = _native.FileEngine(kind=kind)
    file = engine.open(str(tmp_path / "file"), write=True, create=True)
    pid = os.fork()
    if pid == 0:
        try:
            engine.sync(file)
        except RuntimeError as error:
            os._exit(7 if "before a fork" in str(error) else 1)
        os._exit(1)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 7
    engine.close()


def test_kinds_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOLDFAST_FILE_ENGINE", "threads")
    assert _native.FileEngine().kind == "threads"
    monkeypatch.setenv("HOLDFAST_FILE_ENGINE", "tape")
    with pytest.raises(RuntimeError, match='no file engine "tape"'):
        _native.FileEngine()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 70_000), st.integers(0, 15), st.integers(0, 15), st.integers(0, 2**32 - 1))
def test_copying_with_checksum(nbytes: int, to_shift: int, from_shift: int, initial: int) -> None:
    source, target = Memory(nbytes + 16), Memory(nbytes + 32)
    source.bytes[: nbytes + 16] = os.urandom(nbytes + 16)
    crc = _native.copy_crc32c(
        target.address + to_shift, source.address + from_shift, nbytes, initial
    )
    content = source.bytes[from_shift : from_shift + nbytes]
    assert target.bytes[to_shift : to_shift + nbytes] == content
    assert target.bytes[to_shift + nbytes :] == bytes(len(target.bytes) - to_shift - nbytes)
    assert crc == _native.crc32c(source.address + from_shift, nbytes, initial)
