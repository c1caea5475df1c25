"""What is written under a name that others may know goes to a file of that name, or nowhere."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from holdfast.checkpoint.stores import LocalStore, write_synced
from holdfast.elastic import ask_for
from holdfast.elastic.agreement import AcceptorFile, AcceptorState
from holdfast.elastic.channel import LivenessWriter
from holdfast.elastic.faults import Fault
from holdfast.elastic.generation import Identity
from holdfast.elastic.roll import Roll, RunEnd
from holdfast.parallel.comm.flight_recorder import FlightRecorder
from holdfast.parallel.files import create_file, open_added, open_lock, write_own_file
from holdfast.parallel.output import (
    AppendedFile,
    DiskWord,
    LogFile,
    Tail,
    set_foreign_lines_aside,
    write_whole,
)
from holdfast.trainer.run.folder_lock import lock_folder


def _append(path: Path) -> None:
    file = AppendedFile(path, DiskWord(lambda _: None), Tail.KEPT)
    file.append(b"x")
    file.close(0.0)


def _log(path: Path) -> None:
    handler = LogFile(path, "%(message)s")
    handler.emit(logging.makeLogRecord({"msg": "x"}))
    handler.close()


def _set_aside(path: Path) -> None:
    path.with_name("lines").write_bytes(b"foreign\n")
    set_foreign_lines_aside(path.with_name("lines"), lambda _: True)


def _lock_folder(path: Path) -> None:
    with lock_folder(path.parent, "--out"):
        pass


WRITERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "a lock": ("f", open_lock),
    "a lock of a folder": (".lock", _lock_folder),
    "what is added to": ("f", open_added),
    "a new file": ("f", lambda path: create_file(path).close()),
    "a private file": ("f", lambda path: write_own_file(path, b"x")),
    "a whole file": ("f", lambda path: write_whole(path, b"x")),
    "the partial file of a whole one": (
        "f.partial",
        lambda path: write_whole(path.with_suffix(""), b"x"),
    ),
    "records": ("f", _append),
    "a log": ("f", _log),
    "foreign lines": ("lines.set-aside", _set_aside),
    "a synced file": ("f", lambda path: write_synced(path, b"x")),
    "the owner of checkpoints": (
        ".owner.json.partial",
        lambda path: LocalStore(path.parent).set_owner(b"x"),
    ),
    "the newest checkpoint": (
        ".latest.partial",
        lambda path: LocalStore(path.parent).point_latest("x"),
    ),
    "faults asked for": ("f", lambda path: ask_for(path, Fault("kill", 0, 1))),
    "the roll of agents": ("a:1.agent", lambda path: Roll(path.parent).sign("a:1").close()),
    "the end of a run": (
        f".{os.getpid()}.partial",
        lambda path: Roll(path.parent).end(RunEnd(0)),
    ),
    "liveness": ("f", lambda path: LivenessWriter(path).close()),
    "acceptor state": (
        "0.acceptor.partial",
        lambda path: AcceptorFile(path.parent, Identity(0, 0)).write(AcceptorState()),
    ),
    "the right to report": (
        "0.lock",
        lambda path: AcceptorFile(path.parent, Identity(0, 0)).held().__enter__(),
    ),
    "a flight record": (
        f"f.{os.getpid()}",
        lambda path: FlightRecorder(0, path=path.with_suffix("")),
    ),
}


@pytest.mark.parametrize("kind", ["link", "pipe"])
@pytest.mark.parametrize("writer", WRITERS)
def test_no_writer_follows_a_link_or_waits_for_a_reader(
    tmp_path: Path, writer: str, kind: str
) -> None:
    name, write = WRITERS[writer]
    (tmp_path / "free").mkdir()
    write(tmp_path / "free" / name)
    assert list((tmp_path / "free").iterdir())
    precious = tmp_path / "elsewhere"
    precious.write_bytes(b"precious")
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / name
    if kind == "link":
        path.symlink_to(precious)
    else:
        os.mkfifo(path)
    with contextlib.suppress(Exception):  # refusing it is as good as replacing it
        write(path)
    assert precious.read_bytes() == b"precious"
    assert [p.name for p in tmp_path.iterdir()].count("elsewhere") == 1
