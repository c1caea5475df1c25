"""A side without a majority goes on only where all other agents are proved dead: one at most."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from holdfast.elastic import roll as rolls
from holdfast.elastic.agreement import AcceptorState, Report, advance
from holdfast.elastic.generation import Identity
from holdfast.elastic.roll import Roll, RunEnd, nothing_listens
from holdfast.parallel.errors import Superseded


@dataclass
class Agent:
    """An agent in a process of its own, which listens and has signed the roll."""

    address: str
    pid: int

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def start(folder: Path) -> Agent:
    """Start an agent; it has signed when this returns."""
    listening = socket.create_server(("127.0.0.1", 0))
    address = f"127.0.0.1:{listening.getsockname()[1]}"
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        _file = Roll(folder).sign(address)
        os.write(writer, b"!")
        signal.pause()
        os._exit(0)
    listening.close()
    os.read(reader, 1)
    return Agent(address, pid)


@pytest.fixture
def agents(tmp_path: Path) -> Iterator[list[Agent]]:
    made = [start(tmp_path) for _ in range(3)]
    yield made
    for agent in made:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            agent.kill()


@pytest.mark.mp
def test_an_agent_is_dead_once_nothing_listens_and_its_lock_is_free(
    tmp_path: Path, agents: list[Agent], monkeypatch: pytest.MonkeyPatch
) -> None:
    roll, (own, other, third) = Roll(tmp_path), agents
    all_of_them = {agent.address for agent in agents}
    assert roll.dead(all_of_them, {own.address}) is None
    other.kill()
    assert roll.dead(all_of_them, {own.address}) is None  # the third may live
    proof = roll.dead(all_of_them, {own.address, third.address})
    assert proof is not None
    proof.close()
    third.kill()
    with monkeypatch.context() as patch:
        patch.setattr(rolls, "nothing_listens", lambda _: False)
        assert roll.dead(all_of_them, {own.address}) is None  # silence proves nothing
    assert roll.dead({*all_of_them, "127.0.0.1:1"}, {own.address}) is None  # one never signed
    proof = roll.dead(all_of_them, {own.address})
    assert proof is not None
    proof.close()


@pytest.mark.mp
def test_a_firewall_that_refuses_for_a_living_agent_proves_nothing(
    tmp_path: Path, agents: list[Agent], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rolls, "nothing_listens", lambda _: True)
    addresses = [agent.address for agent in agents]
    assert Roll(tmp_path).dead(addresses, addresses[:1]) is None


def test_only_a_refusal_says_that_nothing_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        assert not nothing_listens(address)
    assert nothing_listens(address)
    assert not nothing_listens("no-such-host.invalid:1")
    assert not nothing_listens("not an address")


def test_the_first_word_on_the_end_of_a_run_stands(tmp_path: Path) -> None:
    roll = Roll(tmp_path / "roll")
    assert roll.ended() is None
    roll.end(RunEnd(2, "rank 1: a refusal"))
    roll.end(RunEnd(0))
    assert roll.ended() == RunEnd(2, "rank 1: a refusal")
    (tmp_path / "roll" / "end.json").write_text('{"code": ')
    assert roll.ended() is None


def goes_on(
    side: frozenset[Identity], dead: frozenset[Identity], whole: frozenset[Identity]
) -> bool:
    """Whether a side of a cut generation goes on without the rest, by rounds of its own."""
    start = AcceptorState(1, whole)
    workers = {i: Report(i, start, lost=whole - side, alive=i in side) for i in side | dead}
    for _ in range(4):
        agreed, seen = True, dict(workers)
        for identity, report in seen.items():
            try:
                verdict = advance(report, seen)
            except Superseded:  # the report of a dead one is no longer needed
                del workers[identity]
                continue
            workers[identity] = replace(report, acceptor=verdict.acceptor)
            agreed &= verdict.outcome == "agreed" or identity not in side
        if agreed:
            return workers[min(side)].acceptor.members == side
    return False


@pytest.mark.parametrize("size", range(1, 7))
def test_of_all_splits_and_deaths_at_most_one_side_goes_on_and_one_does_if_the_rest_is_dead(
    size: int,
) -> None:
    """Each rank is on side a or b or dead; a death is reported on behalf of, or is not proved."""
    whole = frozenset(Identity(rank) for rank in range(size))
    for places in itertools.product("abd", repeat=size):
        a, b, dead = (frozenset(Identity(r) for r in range(size) if places[r] == p) for p in "abd")
        # While both sides live, the roll proves nothing: each holds the lock of a living agent.
        proved = dead if not (a and b) else frozenset[Identity]()
        going = [side for side in (a, b) if side and goes_on(side, proved, whole)]
        assert len(going) <= 1
        if (a or b) and not (a and b):
            assert going == [a or b]
