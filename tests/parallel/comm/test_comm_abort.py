"""An abort ends every wait of every group while ranks are killed or stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from holdfast.elastic.hang import HangLimits, silent_operations
from holdfast.parallel.comm.flight_recorder import FlightRecord, read_record
from holdfast.parallel.comm.groups import Groups, build_groups, edit_groups
from holdfast.parallel.comm.protocol import Handle, MembershipChange
from holdfast.parallel.errors import PeerLost
from support.processes.cluster import Cluster

RANKS = 4
TENSOR = {0: (0, 1), 1: (0, 1), 2: (2, 3), 3: (2, 3)}
PIPELINE = {0: (0, 2), 1: (1, 3), 2: (0, 2), 3: (1, 3)}
REASON = "rank 0 does not answer"


def _groups(rank: int, store: Any, record_path: Path | None = None) -> Groups:
    return build_groups(
        store,
        "127.0.0.1",
        rank,
        range(RANKS),
        {"tensor": TENSOR[rank], "pipeline": PIPELINE[rank]},
        backend="gloo",
        generation=0,
        timeout_s=60.0,
        record_path=record_path,
    )


def _use_all(groups: Groups) -> None:
    for group in (groups.world, groups["tensor"], groups["pipeline"]):
        group.all_reduce(torch.ones(3)).wait()
        group.barrier()


def _in_threads(waits: Sequence[Callable[[], None]]) -> tuple[list[threading.Thread], list[str]]:
    """Every call in a thread of its own; what the errors said, as they come."""
    told: list[str] = []

    def run(wait: Callable[[], None]) -> None:
        try:
            wait()
            told.append("returned")
        except PeerLost as error:
            told.append(str(error))

    threads = [threading.Thread(target=run, args=(wait,), daemon=True) for wait in waits]
    for thread in threads:
        thread.start()
    return threads, told


def _until(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.005)


def _has_ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def two_ranks(rank: int, store: Any) -> Groups:
    """The groups of one of two ranks of a pipeline."""
    return build_groups(
        store,
        "127.0.0.1",
        rank,
        range(2),
        {"tensor": (rank,), "pipeline": range(2)},
        backend="gloo",
        generation=0,
    )


def cut_off_in_the_middle(rank: int, world_size: int, store: Any, *, sends: bool) -> str | None:
    """Rank 1 is killed while it takes a large message from rank 0, or gives it one."""
    groups = two_ranks(rank, store)
    large = torch.zeros(1 << 25) if rank == sends else torch.ones(1 << 25)
    post = groups.world.send if rank != sends else groups.world.receive
    store.set(f"pid/{rank}", str(os.getpid()))
    peer = int(store.get(f"pid/{1 - rank}"))
    groups.world.barrier()
    handle = post(large, 1 - rank, 7)
    if rank == sends:
        # The receiver sees the first bytes come.
        _until(lambda: bool(large[0]))
        os.kill(peer if rank == 0 else os.getpid(), signal.SIGKILL)
    threads, told = _in_threads([handle.wait])
    _until(lambda: _has_ended(peer))
    groups.abort(REASON)
    for thread in threads:
        thread.join()
    return told[0]


@pytest.mark.mp
@pytest.mark.chaos
@pytest.mark.parametrize("sends", [True, False], ids=["sending", "receiving"])
def test_who_waits_for_a_message_cut_off_in_the_middle_is_freed(
    cluster: Cluster, sends: bool
) -> None:
    job = "test_comm_abort:cut_off_in_the_middle"
    told = cluster.run(job, 2, timeout_s=60, dying=(1,), sends=sends)[0]
    assert REASON in told


SMALL, MANY = 1 << 11, 2000
"""Numbers in a small message, of which so many fill every buffer between two ranks."""


def small_messages_cut_off(rank: int, world_size: int, store: Any, *, sends: bool) -> list[str]:
    """Rank 1 stops while small messages wait for their turn on a full connection with rank 0.

    The one whose turn it was is cut off in the middle, wherever its receiver is.
    """
    groups = two_ranks(rank, store)
    store.set(f"pid/{rank}", str(os.getpid()))
    peer = int(store.get(f"pid/{1 - rank}"))
    receives = rank == sends
    post = groups.world.receive if receives else groups.world.send
    handles = []
    if receives:
        handles = [post(torch.empty(SMALL), 1 - rank, tag) for tag in range(MANY)]
    groups.world.barrier()  # its notices come after those of the receives
    if receives:
        os.kill(os.getpid(), signal.SIGSTOP)  # the other rank lets it go on, or nobody does
    else:
        _until(lambda: _is_stopped(peer))
        handles = [post(torch.ones(SMALL), 1 - rank, tag) for tag in range(MANY)]
    if rank == 1:
        then = f"kill -STOP {os.getpid()}; kill -CONT {peer}"
        subprocess.run(["sh", "-c", then], check=True)
    ended: list[Handle] = []

    def wait() -> None:
        for handle in handles:
            handle.wait()
            ended.append(handle)

    threads, told = _in_threads([wait])
    looked = -1
    while looked < len(ended):  # until no more come or leave
        looked = len(ended)
        time.sleep(0.3)
    assert looked < MANY
    groups.abort(REASON)
    for thread in threads:
        thread.join()
    return told


def _is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


@pytest.mark.mp
@pytest.mark.chaos
@pytest.mark.parametrize("sends", [True, False], ids=["sending", "receiving"])
def test_who_waits_for_a_small_message_cut_off_in_the_middle_is_freed(
    cluster: Cluster, sends: bool
) -> None:
    job = "test_comm_abort:small_messages_cut_off"
    told = cluster.run(job, 2, timeout_s=60, dying=(1,), sends=sends)[0]
    assert told == [f"generation 0 was aborted: {REASON}"]


def blocked_survivors(rank: int, world_size: int, store: Any, *, how: int) -> Any:
    groups = _groups(rank, store)
    _use_all(groups)
    store.set(f"used/{rank}", "1")
    store.wait([f"used/{r}" for r in range(RANKS)])
    if rank == 0:
        os.kill(os.getpid(), how)
    large = torch.ones(1 << 20)
    alive = {1: 3, 2: 3, 3: 2}[rank]
    waits = [
        groups.world.receive(torch.empty(4), alive, 7).wait,
        groups.world.send(large, alive, 8).wait,
        lambda: groups["tensor"].all_reduce(large.clone()).wait(),
        lambda: groups["pipeline"].receive(torch.empty(2), PIPELINE[rank][rank < 2], 9).wait(),
        lambda: groups.world.receive(torch.empty(2), 0, 10).wait(),
        lambda: groups.control.all_reduce(torch.ones(2)).wait(),
    ]
    if rank != 2:
        del waits[
            2
        ]  # rank 1's tensor group would be first to see it; rank 2 waits for rank 3 in vain
    threads, told = _in_threads(waits)
    _until(lambda: len(told) + sum(o.is_waited_for for o in groups.history()) >= len(waits))
    # Not while another survivor still posts: it would find this one's connection closed.
    store.set(f"waits/{rank}", "1")
    store.wait([f"waits/{r}" for r in range(1, RANKS)])
    groups.abort(REASON)
    groups.abort("a later reason")
    for thread in threads:
        thread.join()
    with pytest.raises(PeerLost, match=REASON):
        groups.world.send(torch.ones(1), alive, 1)
    with pytest.raises(PeerLost, match=REASON):
        groups["pipeline"].barrier()
    change = MembershipChange(1, left=frozenset({0}))
    pipeline = tuple(r for r in PIPELINE[rank] if r)
    tensor = tuple(r for r in TENSOR[rank] if r)
    groups = edit_groups(groups, change, (1, 2, 3), {"tensor": tensor, "pipeline": pipeline})
    total = torch.tensor([float(rank)])
    groups.control.all_reduce(total).wait()
    groups["tensor"].all_reduce(own := torch.tensor([float(rank)])).wait()
    groups.world.barrier()
    return told, total.item(), own.item()


@pytest.mark.mp
@pytest.mark.chaos
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_abort_frees_every_waiter_and_survivors_go_on(cluster: Cluster, how: int) -> None:
    results = cluster.run(
        "test_comm_abort:blocked_survivors", RANKS, timeout_s=40, dying=(0,), how=int(how)
    )
    for rank, (told, total, own) in enumerate(results[1:], 1):
        assert len(told) == (6 if rank == 2 else 5)
        assert "returned" not in told
        # Some may be freed by the connection's end first: a dead or aborted peer's.
        assert any(REASON in message for message in told) or how == signal.SIGKILL
        assert total == 6.0
        assert own == (1.0 if rank == 1 else 5.0)


def abort_before_connection(rank: int, world_size: int, store: Any) -> list[str]:
    """Rank 0 stops before any rank has connected with it."""
    groups = _groups(rank, store)
    if rank == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
    handle = groups.world.receive(torch.empty(1), 0, 3)
    threads, told = _in_threads([handle.wait])
    _until(lambda: any(o.is_waited_for for o in groups.history()))
    groups.abort(REASON)
    for thread in threads:
        thread.join()
    (last,) = groups.world.history()
    assert last.outcome == "failed"
    assert last.started_s != last.started_s, "it was never handed to the transport"
    return told


@pytest.mark.mp
@pytest.mark.chaos
def test_abort_frees_waiters_of_a_connection_that_was_never_made(cluster: Cluster) -> None:
    results = cluster.run("test_comm_abort:abort_before_connection", 2, timeout_s=40, dying=(0,))
    assert results[1] == [f"generation 0 was aborted: {REASON}"]


def late_message(rank: int, world_size: int, store: Any) -> tuple[list[float], list[float]]:
    """A receive of the old generation is abandoned; the message that comes later is not for it."""
    groups = _groups(rank, store)
    _use_all(groups)
    abandoned, expected = torch.zeros(2), torch.zeros(2)
    if rank == 1:
        handle = groups.world.receive(abandoned, 2, 5)
        groups.abort("a drill")
        with pytest.raises(PeerLost, match="a drill"):
            handle.wait()
    groups = edit_groups(
        groups,
        MembershipChange(1),
        range(RANKS),
        {"tensor": TENSOR[rank], "pipeline": PIPELINE[rank]},
    )
    if rank == 1:
        groups.world.receive(expected, 2, 5).wait()
    if rank == 2:
        groups.world.send(torch.tensor([3.0, 4.0]), 1, 5).wait()
    _use_all(groups)
    return abandoned.tolist(), expected.tolist()


@pytest.mark.mp
def test_no_message_meets_a_receive_of_an_older_generation(cluster: Cluster) -> None:
    results = cluster.run("test_comm_abort:late_message", RANKS, timeout_s=40)
    assert results[1] == ([0.0, 0.0], [3.0, 4.0])


def abort_from_elsewhere(rank: int, world_size: int, store: Any, *, rounds: int) -> int:
    """Aborts at arbitrary instants of a busy exchange; each time all edit and go on."""
    groups = _groups(rank, store)
    freed = 0
    for generation in range(1, rounds + 1):
        pause_s = 0.003 * generation + 0.001 * ((rank + generation) % RANKS)
        aborter = threading.Timer(pause_s, groups.abort, (f"drill {generation}",))
        aborter.start()
        try:
            while True:
                values = torch.full((100_000,), float(rank))
                groups.world.all_reduce(values).wait()
                groups["pipeline"].all_reduce(values[:10].clone()).wait()
                assert values[0] == 6.0
        except PeerLost:
            freed += 1
        aborter.join()
        change = MembershipChange(generation)
        groups = edit_groups(
            groups, change, range(RANKS), {"tensor": TENSOR[rank], "pipeline": PIPELINE[rank]}
        )
    total = torch.tensor([1.0])
    groups.world.all_reduce(total).wait()
    assert total.item() == RANKS
    return freed


@pytest.mark.mp
@pytest.mark.chaos
def test_aborts_at_any_instant_leave_communicators_that_can_be_edited(cluster: Cluster) -> None:
    results = cluster.run("test_comm_abort:abort_from_elsewhere", RANKS, timeout_s=60, rounds=12)
    assert results == [12] * RANKS


def judge_pages(rank: int, world_size: int, store: Any, *, folder: str) -> Any:
    """Rank 0 stops; 2 waits for its message, 1 for 2; rank 3 reads their records and judges."""
    paths = [Path(folder) / f"rank-{r}" for r in range(3)]
    groups = _groups(rank, store, Path(folder) / f"rank-{rank}")
    for step in range(3):
        groups.recorder.note_step(step)
        _use_all(groups)
    store.set(f"used/{rank}", "1")
    store.wait([f"used/{r}" for r in range(RANKS)])
    if rank == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
    if rank == 3:
        _until(lambda: _waiting_with_tag([read_record(p) for p in paths], 9) == {1, 2})
        records = [read_record(path) for path in paths]
        now_s = time.monotonic()
        soon = silent_operations(records, lambda moment_s: now_s - moment_s, HangLimits(1e6))
        late = silent_operations(
            records, lambda moment_s: now_s + 60.0 - moment_s, HangLimits(30.0)
        )
        last = next(record for record in records if record.rank == 0).operations[-1]
        groups.abort("the end of the test")
        store.set("judged", "1")
        told = [(s.rank, s.step, s.verdict, s.suspects, s.describe()) for s in late]
        return soon, told, (last.operation, last.outcome)
    if rank == 2:
        threads, _ = _in_threads([groups["pipeline"].receive(torch.empty(2), 0, 9).wait])
    else:
        threads, _ = _in_threads([groups.world.receive(torch.empty(2), 2, 9).wait])
    store.wait(["judged"])
    groups.abort("the end of the test")
    for thread in threads:
        thread.join()
    return None


def _waiting_with_tag(records: Sequence[FlightRecord], tag: int) -> set[int]:
    return {p.rank for p in records if any(o.is_waited_for and o.tag == tag for o in p.operations)}


@pytest.mark.mp
@pytest.mark.chaos
def test_what_a_stopped_rank_did_last_is_read_from_outside(
    cluster: Cluster, tmp_path: Path
) -> None:
    job = "test_comm_abort:judge_pages"
    soon, told, last = cluster.run(job, RANKS, timeout_s=40, dying=(0,), folder=str(tmp_path))[3]
    assert soon == []
    assert [entry[:4] for entry in told] == [
        (1, 2, "the peer never started it", (0,)),
        (2, 2, "the peer never started it", (0,)),
    ]
    assert "rank 2: receive from rank 0 (pipeline, tag 9, 8 bytes) silent for" in told[1][4]
    assert last == ("barrier", "done")
