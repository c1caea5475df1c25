"""Membership at a real Lighthouse: heartbeats, its death and return, events, reports."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch.distributed as dist

from holdfast.elastic.agreement import AcceptorFile, AcceptorState, Report, sealed_report
from holdfast.elastic.agreement.reports import report_from_data, report_to_data
from holdfast.elastic.channel import WorkerChannel, liveness_age_s, receive_message, send_message
from holdfast.elastic.generation import Identity, parse_identities
from holdfast.elastic.lighthouse import (
    Heartbeats,
    Lighthouse,
    RoundClient,
    RoundTimeout,
    heartbeat_ages,
    reached_by,
    replica_id,
)
from holdfast.elastic.membership import Membership
from holdfast.elastic.membership_events import Bulletin, MembershipEvent
from holdfast.elastic.proxy import report_on_behalf_of
from holdfast.elastic.quorum_client import MembershipSettings, QuorumClient
from holdfast.elastic.store import StoreClients
from holdfast.elastic.watch import BulletinFollower, HeartbeatWatch
from holdfast.elastic.worker_spec import WorkerSpec
from holdfast.parallel.errors import MembershipError, Minority
from holdfast.parallel.links import StoreAccess, Tunnels, derived_key, host_store, new_secret
from support.runs.elastic_demo import demonstration, wait_for

pytestmark = pytest.mark.mp

SECRET = new_secret()
KEY = derived_key(SECRET, "lighthouse")
HELD_S = 4.0
"""How long a process holds its interpreter's lock."""


def _spec(folder: Path, rank: int, lighthouse: str, world_size: int, **fields: Any) -> WorkerSpec:
    settings = MembershipSettings(
        lighthouse, "test", world_size, heartbeat_timeout_ms=600, secret=SECRET
    )
    return WorkerSpec(rank, 0, rank, "a", "127.0.0.1:1", True, str(folder), settings, **fields)


@pytest.fixture
def members(tmp_path: Path) -> Iterator[list[Membership]]:
    """Three that may agree, at a Lighthouse of their own."""
    with (
        contextlib.closing(Lighthouse("127.0.0.1", KEY, heartbeat_timeout_ms=600)) as lighthouse,
        contextlib.closing(Tunnels()) as tunnels,
    ):
        address = reached_by(lighthouse.address, tunnels, KEY)
        made = [Membership(_spec(tmp_path, rank, address, 3)) for rank in range(3)]
        yield made
        for member in made:
            member.close()


def _in_threads(*calls: Any) -> list[Any]:
    results: list[Any] = [None] * len(calls)

    def run(number: int) -> None:
        try:
            results[number] = calls[number]()
        except MembershipError as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=(n,)) for n in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def _hold_the_lock(address: str) -> None:
    identity = replica_id("test", Identity(0))
    heartbeats = Heartbeats(address, identity, 100)
    ctypes.PyDLL(None).usleep(int(HELD_S * 1e6))
    heartbeats.close()


def test_a_held_interpreter_lock_does_not_delay_heartbeats() -> None:
    lighthouse = Lighthouse("127.0.0.1", KEY, heartbeat_timeout_ms=600)
    workers: list[int] = [os.getpid()]
    tunnels = Tunnels(lambda: workers)
    address = reached_by(lighthouse.address, tunnels, KEY)
    process = multiprocessing.get_context("forkserver").Process(
        target=_hold_the_lock, args=(address,)
    )
    process.start()
    workers.append(process.pid or 0)
    wait_for(lambda: heartbeat_ages(address, "test"), "a heartbeat")
    worst_s = 0.0
    while process.is_alive():
        worst_s = max(worst_s, heartbeat_ages(address, "test")[Identity(0)])
        if not process.is_alive():
            break
        process.join(0.02)
    assert process.exitcode == 0
    assert worst_s < 0.75 * HELD_S
    tunnels.close()
    lighthouse.close()


def test_an_end_that_was_first_heard_of_in_a_round_has_its_cause(
    members: list[Membership],
) -> None:
    _in_threads(*(lambda m=m: m.agree(step=0, phase="begin") for m in members))
    spec, stop = members[2].spec, threading.Event()
    members.pop().close()
    agent = threading.Thread(
        target=report_on_behalf_of,
        args=(spec.identity, spec.settings, spec.acceptor, stop),
        kwargs={"data": {"cause": "killed for a reason"}},
    )
    agent.start()
    found = _in_threads(*(lambda m=m: m.agree(step=0, phase="reduce") for m in members))
    stop.set()
    agent.join()
    assert [str(identity) for identity in sorted(found[0].identities)] == ["0", "1"]
    for member in members:
        ends = [event for event in member.drain_events() if event.kind == "ended"]
        assert [(end.identity, end.cause) for end in ends] == [(Identity(2), "killed for a reason")]


def test_all_members_get_the_same_value(members: list[Membership]) -> None:
    found = _in_threads(
        *(
            lambda m=m: m.agree(step=m.spec.rank, phase="begin", data={"rank": m.spec.rank})
            for m in members
        )
    )
    assert found[0] == found[1] == found[2]
    assert [(m.rank, m.step, m.held, m.data) for m in found[0].members] == [
        (rank, rank, 0, {"rank": rank}) for rank in range(3)
    ]
    again = _in_threads(*(lambda m=m: m.agree(step=9, phase="again") for m in members))
    assert again[0] == again[1] == again[2]
    assert again[0].number > found[0].number
    assert [member.held for member in again[1].members] == [1, 1, 1]


def test_a_member_that_misses_the_answer_is_told_the_same_value_by_the_others(
    members: list[Membership], monkeypatch: pytest.MonkeyPatch
) -> None:
    exchange, lost = QuorumClient.exchange, list[Any]()

    def losing(client: QuorumClient, own: Report, timeout_s: float) -> Any:
        reports = exchange(client, own, timeout_s)
        decided = all(r.acceptor.accepted and not r.settled for r in reports.values())
        if client.identity == Identity(1) and decided and len(reports) == 3 and not lost:
            lost.append(reports)
            raise RoundTimeout("lost on the way")
        return reports

    monkeypatch.setattr(QuorumClient, "exchange", losing)
    found = _in_threads(*(lambda m=m: m.agree(step=m.spec.rank, phase="p") for m in members))
    assert len(lost) == 1
    assert found[0] == found[1] == found[2]
    assert [member.step for member in found[1].members] == [0, 1, 2]
    for member in members:
        member.committed(1)


FORGED = {
    **{"identity": "9", "ballot": [99, "9", ""], "alive": True, "founder": False},
    **{"world_size": 3, "min_ranks": 1, "lost": "0-2", "held": 99, "step": 1000},
}


def test_reports_of_strangers_at_a_lighthouse_without_a_door_are_ignored(
    members: list[Membership], caplog: pytest.LogCaptureFixture
) -> None:
    over = threading.Event()

    def forge() -> None:
        own = report_to_data(Report(Identity(9), alive=True, world_size=3, min_ranks=1))
        sealed = sealed_report(report_from_data(own), "test:8", members[0].spec.settings.report_key)
        client = RoundClient(members[0].spec.settings.lighthouse)
        for data in itertools.cycle([FORGED, own, sealed, {"report": 5}, {}]):
            if over.is_set():
                return
            with contextlib.suppress(MembershipError):
                client.round("test:9", data, 1.0)

    stranger = threading.Thread(target=forge)
    stranger.start()
    try:
        for _ in range(3):
            found = _in_threads(*(lambda m=m: m.agree(step=1, phase="p") for m in members))
            assert found[0] == found[1] == found[2]
            assert [member.rank for member in found[0].members] == [0, 1, 2]
        assert "a report as test:9 is ignored: it has no proof" in caplog.text
    finally:
        over.set()
        stranger.join()


def test_a_minority_gives_up_with_a_reason(members: list[Membership]) -> None:
    _in_threads(*(lambda m=m: m.agree(step=0, phase="begin") for m in members))
    for member in members[:2]:
        member.close()
    with pytest.raises(Minority, match=r"no majority of generation 1 \(ranks 0-2\)"):
        members[2].agree(step=0, phase="alone", timeout_s=4.0)


def test_two_processes_cannot_report_as_one_worker(tmp_path: Path) -> None:
    acceptor_file = AcceptorFile(tmp_path, Identity(3))
    child = os.fork()
    if child == 0:
        with acceptor_file.held():
            (tmp_path / "held").touch()
            time.sleep(60)
        os._exit(0)
    wait_for(lambda: (tmp_path / "held").exists(), "the other process to hold the acceptor state")
    with pytest.raises(BlockingIOError), acceptor_file.held():
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with acceptor_file.held():
        acceptor_file.write(AcceptorState(2, parse_identities("0-3"), parse_identities("0-2")))
    assert acceptor_file.read() == AcceptorState(
        2, parse_identities("0-3"), parse_identities("0-2")
    )


def test_events_arrive_in_one_order_and_a_hole_is_passed() -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    writer, reader = Bulletin(store), Bulletin(store)
    events = [MembershipEvent("ended", Identity(rank), "killed") for rank in range(3)]
    writer.post(events[0])
    store.add("events", 1)  # an author that died between its number and its event
    writer.post(events[1])
    assert reader.read() == events[:1]
    assert wait_for(reader.read, "the event after the hole") == events[1:2]


class Network:
    """A way to the stores that can be cut off and mended."""

    def __init__(self) -> None:
        self._tunnels = Tunnels()

    def connect(self, address: str, timeout_s: float) -> dist.Store:
        return StoreAccess(self._tunnels, KEY).connect(address, timeout_s)

    def cut(self) -> None:
        self._tunnels.close()

    def mend(self) -> None:
        self._tunnels = Tunnels()


def test_a_store_that_is_gone_for_a_while_costs_no_event() -> None:
    events = [MembershipEvent("ended", Identity(rank), "killed") for rank in range(3)]
    with contextlib.ExitStack() as closing:
        store, address = host_store("127.0.0.1", KEY)
        closing.callback(store.close)
        heard: dict[str, list[MembershipEvent]] = {"cut": [], "other": []}
        networks = {name: Network() for name in heard}
        followers = {}
        for name, network in networks.items():
            closing.callback(network.cut)
            stores = StoreClients(cast("StoreAccess", network))
            followers[name] = BulletinFollower(stores, address, "generation", heard[name].append)
            closing.callback(followers[name].close)
        followers["other"].post(events[0])
        wait_for(lambda: heard["cut"] == events[:1], "the first event")
        networks["cut"].cut()
        followers["cut"].post(events[1])
        followers["other"].post(events[2])
        wait_for(lambda: not followers["cut"].is_open, "the loss to be noticed")
        wait_for(lambda: heard["other"] == [events[0], events[2]], "the event of those that go on")
        networks["cut"].mend()
        wait_for(lambda: len(heard["cut"]) == len(heard["other"]) == 3, "all events")
        assert heard["cut"] == heard["other"] == [events[0], events[2], events[1]]
        assert followers["cut"].is_open


def test_silence_is_told_once_and_newcomers_until_they_are_in() -> None:
    told: list[MembershipEvent] = []
    settings = MembershipSettings("http://127.0.0.1:9", "test", 2, heartbeat_timeout_ms=600)
    watch = HeartbeatWatch(settings, told.append)
    watch.watch(4, parse_identities("0-1"))
    assert watch.judge({Identity(0): 0.1, Identity(1): 0.9}, 0.0) == [
        MembershipEvent("silent", Identity(1), "no heartbeat for 0.90 s", 0.9, generation=4)
    ]
    assert watch.judge({Identity(0): 0.1, Identity(1): 1.0, Identity(2): 0.1}, 1.0) == []
    late = watch.judge({Identity(0): 0.1, Identity(1): 0.1, Identity(2): 0.1}, 3.0)
    assert [(n.kind, n.identity) for n in late] == [("joining", Identity(2))]
    assert watch.judge({Identity(0): 0.1, Identity(1): 0.9, Identity(2): 0.1}, 4.0)[0].age_s == 0.9
    watch.close()


def test_a_channel_carries_messages_and_a_liveness_timestamp(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    heard: list[dict[str, Any]] = []
    channel = WorkerChannel(theirs, tmp_path / "liveness", heard.append)
    assert channel.send("committed", step=3)
    assert receive_message(ours) == {"kind": "committed", "step": 3}
    send_message(ours, {"kind": "queued"})
    wait_for(lambda: heard == [{"kind": "queued"}], "the message")
    age_s = liveness_age_s(tmp_path / "liveness")
    assert age_s is not None
    channel.close()
    wait_for(
        lambda: (liveness_age_s(tmp_path / "liveness") or 0) > age_s, "the timestamp to grow old"
    )


@pytest.mark.chaos
def test_training_goes_on_without_a_lighthouse_and_changes_wait_for_its_return(
    tmp_path: Path,
) -> None:
    with demonstration(tmp_path, 4) as run:
        run.start_node("a", (0, 1))
        run.start_node("b", (2, 3))
        first = run.reach(0, ["0", "1", "2", "3"])
        run.lighthouse.kill()
        run.lighthouse.join()
        run.more_steps(0, 30)
        os.kill(run.pid(3), signal.SIGKILL)
        wait_for(lambda: run.records(0, "disturbed"), "the loss to be noticed")
        assert run.generation(0) == first
        stopped_at = run.step(0)
        run.lighthouse = run.start_lighthouse()
        for rank in range(4):
            found = run.reach(rank, ["0", "1", "2", "3.1"], after=first["number"])
            assert found["number"] > first["number"]
        # The others may have finished one step more than the one that rank 0 was interrupted after.
        assert run.records(0, "step")[stopped_at]["step"] in (stopped_at + 1, stopped_at + 2)
        run.check_history(range(4))


@pytest.mark.chaos
def test_an_idle_lighthouse_restart_changes_nothing(tmp_path: Path) -> None:
    with demonstration(tmp_path, 2) as run:
        run.start_node("a", (0, 1))
        first = run.reach(0, ["0", "1"])
        run.lighthouse.kill()
        run.lighthouse.join()
        run.lighthouse = run.start_lighthouse()
        run.more_steps(0, 200)  # silence counts again a while after its return
        assert run.generation(0) == first
        log = json.dumps((tmp_path / "a.log").read_text())
        assert "no heartbeat" not in log


def test_an_acceptor_waits_for_room_on_its_disk_and_keeps_what_it_promised(tmp_path: Path) -> None:
    file = AcceptorFile(tmp_path, Identity(3))
    file.write(AcceptorState(1))
    blocked = tmp_path / "3.acceptor.partial"
    blocked.mkdir()  # so that no file of that name can be written
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        assert file.read().generation == 1
        slept.append(seconds)
        if len(slept) == 3:
            blocked.rmdir()

    file.write(AcceptorState(2), sleep=sleep)
    assert file.read().generation == 2
    assert len(slept) == 3
    blocked.mkdir()
    with pytest.raises(OSError, match="directory"):
        file.write(AcceptorState(3), sleep=lambda _: None)
