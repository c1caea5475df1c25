"""A save that goes wrong is named, and frees the state: reports and snapshots without processes."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch.distributed import HashStore, Store, TCPStore

from holdfast import _native
from holdfast.checkpoint.format import WritePlan
from holdfast.checkpoint.saving.arena import Arena, Cancelled, Deadline, FileStream
from holdfast.checkpoint.saving.coordination import Coordination, Members
from holdfast.checkpoint.saving.save import reported_checksums
from holdfast.checkpoint.saving.snapshot import ALL, Snapshot, SnapshotItem
from holdfast.parallel.errors import CheckpointError


def _ranks(size: int) -> list[Coordination]:
    store = HashStore()
    return [Coordination(Members(rank, (0,) * size, store), "save") for rank in range(size)]


def test_reports_are_collected_by_rank() -> None:
    ranks = _ranks(3)
    for number, rank in enumerate(ranks):
        rank.report("written", {"crc32c": [number]})
    found = ranks[0].collect("written", range(3), Deadline(5.0))
    assert found == {number: {"crc32c": [number]} for number in range(3)}
    assert [rank.is_coordinator for rank in ranks] == [True, False, False]


def test_reports_of_no_rank_are_there_without_asking_the_store() -> None:
    """torch's store crashes when it is asked for no keys and logs what it does."""
    alone = Coordination(Members(0, (0,), Store()), "save")
    assert alone.collect("header", [], Deadline(5.0)) == {}


def test_a_rank_that_is_late_is_named_with_its_phase() -> None:
    first, second, _ = _ranks(3)
    first.report("written", {})
    second.enter("copy")
    wanted = r"no word in time from rank 1 \(copy\), rank 2 \(has not begun\)"
    with pytest.raises(CheckpointError, match=wanted):
        first.collect("written", range(3), Deadline(0.05))


def test_ranks_are_named_by_their_numbers_in_the_run() -> None:
    store, left = HashStore(), (0, 2, 3)  # rank 1 was lost
    ranks = [Coordination(Members(at, (0, 0, 0), store, numbers=left), "save") for at in (0, 1, 2)]
    ranks[1].enter("copy")
    wanted = r"no word in time from rank 2 \(copy\), rank 3 \(has not begun\)"
    with pytest.raises(CheckpointError, match=wanted):
        ranks[0].collect("written", [1, 2], Deadline(0.05))
    ranks[1].report_failure("the disk is full")
    with pytest.raises(CheckpointError, match=r"^rank 2, copy: the disk is full$"):
        ranks[0].collect("written", [1, 2], Deadline(5.0))


def test_a_rank_that_wrote_another_number_of_pieces_is_named_by_its_number_in_the_run() -> None:
    members = Members(0, (0, 0), Store(), numbers=(0, 2))  # rank 1 was lost
    plan = WritePlan({}, (), 1)
    assert reported_checksums(plan, {0: {"crc32c": []}, 1: {"crc32c": []}}, members) == {
        0: [],
        1: [],
    }
    with pytest.raises(CheckpointError, match=r"^rank 2 has written 1 pieces and was to write 0;"):
        reported_checksums(plan, {0: {"crc32c": []}, 1: {"crc32c": [7]}}, members)


def test_the_first_failure_is_what_every_rank_is_told() -> None:
    first, second, third = _ranks(3)
    second.enter("write")
    second.report_failure("the disk is full")
    third.enter("sync")
    third.report_failure("it came later")
    for rank in (first, third):
        with pytest.raises(CheckpointError, match=r"^rank 1, write: the disk is full$"):
            rank.collect("end", [0], Deadline(5.0))


def test_a_rank_whose_connection_broke_tells_the_others_by_a_new_one() -> None:
    host = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with cut_connections("127.0.0.1", host.port) as (port, cut):
        store = TCPStore("127.0.0.1", port, wait_for_workers=False)
        broken = Coordination(Members(1, (0, 0), store).with_own_connection(), "1")
        broken.enter("begin")
        cut()
        with pytest.raises(RuntimeError):
            broken.report_failure("the disk is full")
        again = broken.connected_again("rank 1, begin: the connection broke")
        with pytest.raises(CheckpointError, match=r"^rank 1, begin: the connection broke$"):
            Coordination(Members(0, (0, 0), host), "1").collect("end", [1], Deadline(5.0))
        Coordination(again, "2").report("end", {"a": 1})
        assert Coordination(Members(0, (0, 0), host), "2").collect("end", [1], Deadline(5.0))


@contextlib.contextmanager
def cut_connections(host: str, port: int) -> Iterator[tuple[int, Callable[[], None]]]:
    """A port that leads to another, and what cuts the connections that it has."""
    listening = socket.create_server((host, 0))
    carried: list[socket.socket] = []

    def carry(near: socket.socket, far: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := near.recv(4096):
                far.sendall(data)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = listening.accept()
                far = socket.create_connection((host, port))
                carried.extend((near, far))
                for ends in ((near, far), (far, near)):
                    threading.Thread(target=carry, args=ends, daemon=True).start()

    def cut() -> None:
        for connection in carried:
            connection.shutdown(socket.SHUT_RDWR)
        carried.clear()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield listening.getsockname()[1], cut
    finally:
        listening.close()
        cut()


def test_a_wait_ends_when_the_save_is_given_up_here() -> None:
    first, _ = _ranks(2)
    deadline = Deadline(60.0)
    threading.Timer(0.05, setattr, (deadline, "cancelled", True)).start()
    with pytest.raises(Cancelled):
        first.collect("written", range(2), deadline)


def test_members_know_the_ranks_of_their_node() -> None:
    assert Members(2, (0, 1, 0, 1), HashStore()).neighbours == [0, 2]


@pytest.fixture
def engine() -> Iterator[_native.FileEngine]:
    engine = _native.FileEngine(direct=False)
    yield engine
    engine.close()


def _snapshot(
    engine: _native.FileEngine, path: Path, state: list[torch.Tensor], deadline: Deadline
) -> Snapshot:
    """A snapshot whose item n has to be copied before fence n."""
    size = state[0].numel() * state[0].element_size()
    items = [SnapshotItem(t, "f", number * size, number) for number, t in enumerate(state)]
    snapshot = Snapshot(items, Arena(engine, 1), deadline)
    handle = engine.open(str(path), write=True, create=True, size=-1)
    snapshot.open(lambda: snapshot.use({"f": handle}))
    return snapshot


def test_a_fence_copies_what_it_protects_and_no_more(
    engine: _native.FileEngine, tmp_path: Path
) -> None:
    state = [torch.full((1000,), float(number)) for number in range(4)]
    snapshot = _snapshot(engine, tmp_path / "f", state, Deadline(60.0))
    assert snapshot.fence(1) == 1
    assert len(snapshot.checksums) == 2
    state[0].fill_(9.0)
    state[1].fill_(9.0)
    snapshot.run()
    assert snapshot.copied
    assert snapshot.fence(3) == ALL
    engine.wait_all()
    written = torch.frombuffer(bytearray((tmp_path / "f").read_bytes()), dtype=torch.float32)
    assert written.view(4, 1000)[:, 0].tolist() == [0.0, 1.0, 2.0, 3.0]


def test_an_abort_opens_fences_at_once_and_ends_the_copy(
    engine: _native.FileEngine, tmp_path: Path
) -> None:
    state = [torch.zeros(1000) for _ in range(3)]
    snapshot = _snapshot(engine, tmp_path / "f", state, Deadline(60.0))
    snapshot.abort("the ranks change")
    assert snapshot.fence(2) == ALL
    assert snapshot.checksums == [], "nothing was copied"
    with pytest.raises(CheckpointError, match="the ranks change"):
        snapshot.run()


def test_a_fence_that_waits_for_the_files_is_freed_by_an_abort(tmp_path: Path) -> None:
    engine = _native.FileEngine(direct=False)
    snapshot = Snapshot(
        [SnapshotItem(torch.zeros(10), "f", 0, 0)], Arena(engine, 1), Deadline(60.0)
    )
    began = time.monotonic()
    threading.Timer(0.05, snapshot.abort).start()
    assert snapshot.fence(0) == ALL, "no file is open yet"
    assert time.monotonic() - began < 30
    assert isinstance(snapshot.error, Cancelled)
    engine.close()


def test_the_reason_of_an_abort_stays_when_the_copy_under_way_is_cancelled_by_it(
    engine: _native.FileEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = _snapshot(engine, tmp_path / "f", [torch.zeros(1000)], Deadline(60.0))

    def room(stream: FileStream, position: int, deadline: Deadline) -> torch.Tensor:
        snapshot.abort("the ranks change")
        raise Cancelled

    monkeypatch.setattr(FileStream, "room", room)
    assert snapshot.fence(0) == ALL
    with pytest.raises(CheckpointError, match="the ranks change"):
        snapshot.run()
