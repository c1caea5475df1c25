"""How long saves, loads and uploads wait for others, and how they go on: with the test's clock."""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import pairwise

import pytest
from torch.distributed import HashStore

from holdfast.checkpoint.loading import node_memory
from holdfast.checkpoint.loading.node_memory import NodeMeeting, NodeMemory
from holdfast.checkpoint.saving.arena import Cancelled, Deadline
from holdfast.checkpoint.saving.coordination import Coordination, Members
from holdfast.checkpoint.tiers.uploader import retry
from holdfast.parallel.errors import CheckpointError, PeerLost
from support.processes.fake_clock import FakeClock

LIMIT_S = 600.0


def deadline_of(clock: FakeClock) -> Deadline:
    return Deadline(LIMIT_S, clock=clock, pause=clock.sleep)


def test_a_rank_that_does_not_report_is_waited_for_until_the_deadline_and_named() -> None:
    clock = FakeClock()
    begin, store = clock(), HashStore()
    first = Coordination(Members(0, (0, 0), store), "save")
    first.report("written", {})
    with pytest.raises(CheckpointError, match=r"no word in time from rank 1 \(has not begun\)"):
        first.collect("written", range(2), deadline_of(clock))
    assert clock() - begin == pytest.approx(LIMIT_S, abs=0.1)
    with pytest.raises(CheckpointError, match="no word in time"):
        first.collect("written", range(2), deadline_of(clock), patience_s=10.0)
    assert clock() - begin == pytest.approx(2 * LIMIT_S + 10, abs=0.1)


def test_an_upload_is_tried_ever_less_often_until_the_deadline() -> None:
    clock = FakeClock()
    begin, tries = clock(), []

    def attempt() -> None:
        tries.append(clock())
        raise OSError("the network is away")

    with pytest.raises(CheckpointError, match="file could not be uploaded: OSError: the network"):
        retry(attempt, "file", deadline_of(clock))
    pauses = [after - before for before, after in pairwise(tries)]
    for number, pause in enumerate(pauses):
        longest = min(0.2 * 2**number, 10.0)
        assert longest / 2 <= pause <= longest
    assert LIMIT_S - 20 < clock() - begin <= LIMIT_S


def test_an_upload_that_was_given_up_is_not_tried_again() -> None:
    clock = FakeClock()
    deadline, tries = deadline_of(clock), []

    def attempt() -> None:
        tries.append(clock())
        deadline.cancelled = len(tries) == 3
        raise OSError

    with pytest.raises(Cancelled):
        retry(attempt, "file", deadline)
    assert len(tries) == 3


def meeting_of(clock: FakeClock, check: Callable[[], None] = lambda: None) -> NodeMeeting:
    return NodeMeeting(HashStore(), "load", 60.0, check, clock=clock, sleep=clock.sleep)


def test_a_rank_that_does_not_come_to_a_load_is_named() -> None:
    clock = FakeClock()
    begin = clock()
    with pytest.raises(PeerLost, match="rank 1 did not begin to load within 60 s"):
        NodeMemory(meeting_of(clock), 0, (0, 1), 64)
    assert clock() - begin == pytest.approx(60, abs=0.1)


def test_a_rank_that_stands_still_in_a_load_is_named_and_the_others_are_asked_meanwhile() -> None:
    clock, asked = FakeClock(), []
    meeting = meeting_of(clock, lambda: asked.append(clock()))
    other = os.memfd_create("other")
    os.ftruncate(other, 4 * node_memory._PAGE)
    came = (1).to_bytes(8, "little")
    os.pwrite(other, came, 8 * node_memory._ATTACHED)
    meeting.store.set("load/load/memory/1", f"{os.getpid()} {other}")
    memory = NodeMemory(meeting, 0, (0, 1), 64)
    begin = clock()
    with pytest.raises(PeerLost, match="rank 1 did not go on with loading for 60 s"):
        memory.wait_filled(1, 0)
    assert clock() - begin == pytest.approx(60, abs=0.1)
    assert len(asked) == pytest.approx(120, abs=2)  # whether the generation stands
    memory.close()
    os.close(other)
