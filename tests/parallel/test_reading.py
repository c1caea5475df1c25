"""What a name leads to, and what a file has in it, ends with a value or one error: at once."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from holdfast.parallel.reading import (
    MALFORMED,
    Count,
    decode_json,
    of_kind,
    open_regular,
    parse_json,
    read_regular,
    read_whole,
)


def _listen(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (os.mkfifo, "it is a pipe, a socket or a device, not a file"),
        (os.mkdir, "it is a folder, not a file"),
        (_listen, r"[Nn]o such device"),
        (lambda path: path.symlink_to("/dev/zero"), "it is a pipe, a socket or a device"),
        (lambda path: path.symlink_to(path), "symbolic links"),
        (lambda path: path.symlink_to("/nowhere"), "No such file"),
        (lambda path: os.truncate(os.open(path, os.O_CREAT | os.O_RDWR), 1 << 40), "at most 100"),
    ],
)
def test_what_is_no_file_or_too_large_is_refused_at_once(
    tmp_path: Path, make: Callable[[Path], object], reason: str
) -> None:
    make(tmp_path / "f")
    with pytest.raises(OSError, match=reason):
        read_regular(tmp_path / "f", 100)


def test_a_read_takes_memory_for_the_file_and_not_for_its_limit(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"1" * 9)
    with open_regular(tmp_path / "f") as file:
        file.seek(2)
        assert read_whole(file, tmp_path, 1 << 62) == b"1" * 7
    assert read_regular(Path("/proc/self/stat")), "files of the kernel have no size"


def test_a_name_with_a_nul_is_refused_as_a_file_that_cannot_be_opened() -> None:
    with pytest.raises(OSError, match="null"):
        read_regular(Path("a\0b"))


def test_a_link_is_followed_only_where_that_is_allowed(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"1")
    (tmp_path / "l").symlink_to("f")
    assert read_regular(tmp_path / "l", 1) == b"1"
    with pytest.raises(OSError, match="it is a link"):
        open_regular(tmp_path / "l", follow=False)
    with pytest.raises(PermissionError, match="it is a link"):
        read_regular(tmp_path / "l", own=True)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'"\\ud800"', "surrogates"),
        (b"9" * 6000, "digits"),
        (b"\xff\xfe{", "JSON|decode|utf"),
        (b"", "Expecting value"),
    ],
    ids=["deep list", "deep object", "surrogate", "long number", "no text", "nothing"],
)
def test_text_that_is_no_json_of_use_is_refused_with_the_reason(
    content: bytes, reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_json(content)


def test_json_of_other_programs_is_read() -> None:
    assert parse_json(b'{"a": [1, "\\ud83d\\ude00"]}') == {"a": [1, "\U0001f600"]}
    assert str(parse_json(b"NaN")) == "nan"


@dataclass(frozen=True, slots=True)
class _Sized:
    size: Count
    names: tuple[str, ...] = ()


@pytest.mark.parametrize(
    "content", [b'{"size":-1}', b'{"size":9223372036854775808}', b'{"size":1.5}', b"{}", b"[]"]
)
def test_a_value_of_another_kind_is_refused_by_its_place(content: bytes) -> None:
    with pytest.raises(ValueError, match=r"\$|missing|Expected|out of range"):
        decode_json(content, _Sized)
    with pytest.raises(MALFORMED):
        of_kind(parse_json(content), _Sized)


def test_a_value_of_the_kind_is_built() -> None:
    found = _Sized(3, ("a",))
    assert decode_json(b'{"size":3,"names":["a"]}', _Sized) == found
    assert of_kind({"size": 3, "names": ["a"]}, _Sized) == found


BEGUN_BY_FOUR_THREADS = """
import sys, threading
from dataclasses import make_dataclass
from holdfast.parallel.reading import decode_json, of_kind

sys.setswitchinterval(1e-6)
one = {"x": 1}
for number in range(150):
    inner = [make_dataclass(f"Inner{i}", [("x", int)]) for i in range(5)]
    fields = [(f"f{i}", inner[i]) for i in range(5)]
    outer = make_dataclass("Outer", [*fields, ("z", int)])
    plain = {**{f"f{i}": one for i in range(5)}, "z": 2}
    content = str(plain).replace("'", '"')
    begin, right = threading.Barrier(4), []

    def convert(read):
        begin.wait()
        right.append(read().z == 2)

    ways = [lambda: of_kind(plain, outer), lambda: decode_json(content, outer)] * 2
    threads = [threading.Thread(target=convert, args=(way,)) for way in ways]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [True] * 4, right
"""


@pytest.mark.mp
def test_threads_may_read_values_of_a_new_type_at_the_same_time() -> None:
    done = subprocess.run(
        [sys.executable, "-c", BEGUN_BY_FOUR_THREADS], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, (done.returncode, done.stderr)
