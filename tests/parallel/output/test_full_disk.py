"""Records on a disk that refuses: whole, in order, each once, told once, never an error."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from holdfast.parallel.output import appended_file
from holdfast.parallel.output.appended_file import AppendedFile, Tail
from holdfast.parallel.output.disk_queue import DiskWord
from holdfast.parallel.output.foreign_lines import (
    rising_steps,
    set_foreign_lines_aside,
)
from holdfast.parallel.output.whole_files import write_whole
from support.processes.fake_clock import FakeClock


class Disk:
    """Room for so many bytes: what is beyond it is not written, and then refused."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
        self.room = room
        write = os.write

        def limited(descriptor: int, content: bytes) -> int:
            if not self.room:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            written = write(descriptor, content[: self.room])
            self.room -= written
            return written

        monkeypatch.setattr(appended_file.os, "write", limited)


def line(number: int) -> bytes:
    return f'{{"step": {number}}}\n'.encode()


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def file(tmp_path: Path, told: list[str], clock: FakeClock) -> AppendedFile:
    word = DiskWord(told.append, clock=clock)
    return AppendedFile(tmp_path / "m.jsonl", word, Tail.SET_ASIDE, clock=clock, limit_bytes=200)


def test_what_a_full_disk_refuses_follows_whole_and_in_order(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    file: AppendedFile,
    told: list[str],
    clock: FakeClock,
) -> None:
    disk = Disk(monkeypatch, room=2 * len(line(1)) + 5)
    for number in range(1, 6):
        file.append(line(number))
        assert (tmp_path / "m.jsonl").read_bytes() == line(1) + line(2)[
            : len(line(2)) * (number > 1)
        ]
    assert file.waits
    assert len(told) == 1
    assert "No space left" in told[0]
    disk.room = 1 << 20
    clock.now_s += 1
    file.append(line(6))
    assert (tmp_path / "m.jsonl").read_bytes() == b"".join(map(line, range(1, 7)))
    assert not file.waits
    assert len(told) == 2


def test_what_has_no_room_in_memory_is_counted_and_what_is_lost_is_told(
    monkeypatch: pytest.MonkeyPatch, file: AppendedFile, told: list[str], clock: FakeClock
) -> None:
    disk = Disk(monkeypatch, room=0)
    for number in range(10, 40):
        file.append(line(number))
    disk.room = 1 << 20
    clock.now_s += 1
    file.append(line(40))
    assert any("lacks" in text and "no memory" in text for text in told)
    disk.room = 0
    file.append(line(41))
    file.close(patience_s=0)
    assert "lacks the last 1 records" in told[-1]


def test_a_line_that_a_dead_process_left_is_set_aside_before_more_follow(
    tmp_path: Path, file: AppendedFile
) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(line(1) + b'{"st')
    file.append(line(2))
    assert path.read_bytes() == line(1) + line(2)
    assert (tmp_path / "m.jsonl.set-aside").read_bytes() == b'{"st\n'


def test_a_process_that_is_stopped_with_the_lock_holds_nobody_up(
    tmp_path: Path, file: AppendedFile
) -> None:
    with (tmp_path / "m.jsonl").open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        file.append(line(1))
    assert (tmp_path / "m.jsonl").read_bytes() == line(1)


def test_lines_that_are_no_records_are_moved_and_told(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    foreign = [b'{"step": true}\n', b"[1]\n", b'{"loss": 1}\n', b"\xff\n", line(1), b'{"step": 3']
    path.write_bytes(line(1) + b"".join(foreign[:3]) + line(2) + b"".join(foreign[3:]))
    note = set_foreign_lines_aside(path, rising_steps())
    assert "6 lines" in note
    assert "m.jsonl.set-aside" in note
    assert [json.loads(text)["step"] for text in path.read_text().splitlines()] == [1, 2]
    assert (tmp_path / "m.jsonl.set-aside").read_bytes() == b"".join(foreign) + b"\n"
    assert set_foreign_lines_aside(path, rising_steps()) == ""


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_regular_file_is_refused_at_once(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    make(tmp_path / "m.jsonl")
    with pytest.raises(OSError, match="not a file"):
        set_foreign_lines_aside(tmp_path / "m.jsonl", rising_steps())


def test_a_whole_file_leaves_no_partial_one(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()  # which no file can replace
    with pytest.raises(OSError, match="directory"):
        write_whole(tmp_path / "a", b"1")
    write_whole(tmp_path / "b", b"1")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_a_file_that_was_removed_is_made_again_and_a_moved_one_is_not(
    tmp_path: Path, file: AppendedFile, told: list[str]
) -> None:
    file.append(line(1))
    (tmp_path / "m.jsonl").unlink()
    file.append(line(2))
    assert (tmp_path / "m.jsonl").read_bytes() == line(2)
    (tmp_path / "m.jsonl").rename(tmp_path / "moved")
    file.append(line(3))
    assert (tmp_path / "moved").read_bytes() == line(2) + line(3)
    assert not (tmp_path / "m.jsonl").exists()
    assert told == []
