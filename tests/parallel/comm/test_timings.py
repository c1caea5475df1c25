"""Slow links are told apart from slow ends and slow ranks, by the times that ranks noted."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, strategies as st

from holdfast.elastic.hang import HangLimits, silent_operations
from holdfast.parallel.comm.flight_recorder import FlightRecorder, MessageEnd
from holdfast.parallel.comm.timings.matrix import Delay, delays, fitted
from holdfast.parallel.comm.timings.messages import (
    NeighbourTimes,
    TimedMessage,
    clock_offsets,
    moved_s,
)
from holdfast.parallel.comm.timings.probe import roles, strides
from holdfast.parallel.comm.timings.slow_links import SlowLink, slow_links
from holdfast.parallel.comm.timings.window import joined, rows_of, table_of
from holdfast.trainer.step.vote.slowness import waited_for
from support.network.link_logs import Fault, Log, hung_records, simulated_log
from support.soak import SOAKS

FACTOR = 1.5
RANKS = 16
DRAWS = 200
QUIET = 10_000 if SOAKS else 1_500


def links(log: Log) -> list[SlowLink]:
    ring = [NeighbourTimes(rank, *near) for rank, near in enumerate(log.between_neighbours_s)]
    offsets = clock_offsets(ring)
    return slow_links(
        delays(
            TimedMessage(
                m.source,
                m.destination,
                "ring",
                m.bytes,
                moved_s(
                    m.ready_s - offsets[m.source],
                    m.posted_s - offsets[m.destination],
                    m.done_s - offsets[m.destination],
                ),
            )
            for m in log.messages
        ),
        FACTOR,
    )


def slow_ranks(log: Log) -> list[int]:
    own_s = {rank: statistics.mean(seconds) for rank, seconds in log.computed_s.items()}
    noise_s = {
        rank: statistics.stdev(seconds) / len(seconds) ** 0.5
        for rank, seconds in log.computed_s.items()
    }
    return waited_for(own_s, noise_s, log.waited_s)


def told(log: Log) -> list[tuple[str, int | None, int | None]]:
    """All that is told of a log."""
    found = [(link.side, link.source, link.destination) for link in links(log)]
    return [*found, *(("rank", rank, None) for rank in slow_ranks(log))]


@pytest.mark.parametrize(
    ("fault", "slowness", "side"),
    [
        ("slow link", 2.0, "link"),
        ("slow sender", 2.0, "sender"),
        ("slow receiver", 2.0, "receiver"),
        ("slow host", 2.0, "host"),
        ("slow rank", 1.3, "rank"),
    ],
)
def test_each_fault_is_named_exactly_over_two_strides(
    fault: Fault, slowness: float, side: str
) -> None:
    draw = random.Random(fault)
    for _ in range(DRAWS):
        at = draw.randrange(RANKS)
        source = None if side == "receiver" else at
        destination = {"link": (at + 1) % RANKS, "receiver": at, "host": at}.get(side)
        log = simulated_log(draw, fault, at, slowness=slowness)
        assert told(log) == [(side, source, destination)]


def test_one_stride_leaves_open_which_end_is_slow_and_says_so() -> None:
    draw = random.Random(1)
    for _ in range(DRAWS):
        at = draw.randrange(RANKS)
        (found,) = links(simulated_log(draw, "slow link", at, strides=(1,)))
        after = (at + 1) % RANKS
        assert (found.side, found.source, found.destination) == ("open", at, after)
        assert found.place == (
            f"the link from rank {at} to rank {after}, the sending side of rank {at} or the "
            f"receiving side of rank {after}"
        )


@pytest.mark.slow
def test_no_quiet_window_is_called_slow() -> None:
    draw = random.Random(2)
    alarms = [number for number in range(QUIET) if told(simulated_log(draw, "none", 0))]
    assert alarms == []


@pytest.mark.parametrize("cut", [False, True])
def test_a_hang_is_that_of_a_rank_that_did_not_come_or_of_a_link(cut: bool) -> None:
    draw = random.Random(3)
    for _ in range(DRAWS):
        at, stride = draw.randrange(RANKS), draw.choice((1, 3, 5))
        records = hung_records(draw, at, cut=cut, stride=stride)
        found = silent_operations(records, lambda moment_s: 1000 - moment_s, HangLimits())
        edges = {silent.link for silent in found} - {None}
        if cut:
            assert edges == {(at, (at + stride) % RANKS)}
            assert any(
                f"the link from rank {at} to rank {(at + stride) % RANKS} hangs"
                in silent.describe()
                for silent in found
            )
        else:
            assert not edges
            assert {silent.suspects for silent in found} == {(at,)}


def matrix(cells: dict[tuple[int, int], float]) -> dict[tuple[int, int], Delay]:
    return {edge: Delay(ratio, ratio) for edge, ratio in cells.items()}


def test_an_end_with_one_edge_stays_possible_and_one_with_others_does_not() -> None:
    chain = {(0, 1): 3.0, (1, 0): 1.0, (1, 2): 1.0, (2, 1): 1.0}
    (found,) = slow_links(matrix(chain), FACTOR)
    assert (found.side, found.source_may, found.destination_may) == ("open", True, False)
    assert found.place == "the link from rank 0 to rank 1 or the sending side of rank 0"
    (found,) = slow_links(matrix({(0, 1): 2.0, (1, 0): 1.0}), FACTOR)
    assert (found.source_may, found.destination_may) == (True, True)


def test_two_links_of_two_senders_are_two_links() -> None:
    cells = {(a, b): 1.0 for a in range(4) for b in range(4) if a != b}
    cells |= {(0, 1): 2.0, (2, 3): 4.0}
    found = slow_links(matrix(cells), FACTOR)
    assert [(link.side, link.source, link.destination) for link in found] == [
        ("link", 2, 3),
        ("link", 0, 1),
    ]


def message(
    source: int, destination: int, seconds: float, *, is_bound: bool = False, kind: str = "a"
) -> TimedMessage:
    return TimedMessage(source, destination, kind, 1000, seconds, is_bound=is_bound)


def test_seven_messages_are_no_evidence() -> None:
    usual = [message(1, 0, 1.0)] * 8 + [message(2, 0, 1.0)] * 8
    assert delays([*usual, *[message(0, 1, 9.0)] * 7]).keys() == {(1, 0), (2, 0)}
    assert delays([*usual, *[message(0, 1, 9.0)] * 8])[0, 1].ratio == pytest.approx(9.0)


def test_kinds_of_messages_are_not_compared_with_each_other() -> None:
    quick = [message(0, 1, 1.0), message(1, 0, 1.0)] * 8
    slow = [message(2, 3, 9.0, kind="b"), message(3, 2, 9.0, kind="b")] * 8
    assert {delay.ratio for delay in delays([*quick, *slow]).values()} == {1.0}


def test_a_message_that_may_have_been_usual_counts_only_if_it_was() -> None:
    usual = [message(1, 0, 1.0), message(2, 0, 1.0)] * 8
    late = [message(0, 1, 9.0, is_bound=True)] * 20
    assert (0, 1) not in delays([*usual, *late])
    early = [message(0, 1, 1.1, is_bound=True)] * 8
    assert delays([*usual, *late, *early])[0, 1].ratio == pytest.approx(1.1)


@given(st.floats(1e-6, 1e-2), st.floats(1e-10, 1e-6), st.sets(st.integers(1, 1 << 24), min_size=2))
def test_latency_and_rate_are_found_in_sizes_and_seconds(
    latency_s: float, per_byte_s: float, sizes: set[int]
) -> None:
    model = fitted([(size, latency_s + size * per_byte_s) for size in sizes])
    for size in sizes:
        assert model.seconds(size) == pytest.approx(latency_s + size * per_byte_s, rel=1e-3)


@pytest.mark.parametrize("points", [[(8, 2.0)], [(8, 4.0), (16, 1.0)], [(8, 1.0), (16, 4.0)]])
def test_neither_latency_nor_rate_is_negative(points: list[tuple[int, float]]) -> None:
    model = fitted(points)
    assert min(model.latency_s, model.per_byte_s) >= 0 < model.seconds(8)


SHARED = NeighbourTimes(7, 0.0, 0.0)


def end(
    peer: int, *, is_send: bool, began_s: float, ended_s: float = 9.0, turn: int = 0
) -> MessageEnd:
    return MessageEnd("data", 5, turn, peer, is_send, 8192, began_s, ended_s, is_bound=is_send)


def tables(*ends: Sequence[MessageEnd], near: Sequence[NeighbourTimes] = ()) -> torch.Tensor:
    told = [
        table_of(rank, found, 50, near=(near or [SHARED] * 9)[rank], step_s=0.5 + rank)
        for rank, found in enumerate(ends)
    ]
    return torch.stack(told)


def test_a_message_moves_from_the_later_of_both_ends_until_its_destination_sees_it() -> None:
    sent = [end(1, is_send=True, began_s=2.0), end(1, is_send=True, began_s=5.0, turn=1)]
    taken = [
        end(0, is_send=False, began_s=4.0, ended_s=6.5),
        end(0, is_send=False, began_s=4.5, ended_s=6.75, turn=1),
    ]
    window = joined(tables(sent, taken, []), (0, 1, 2))
    assert [(m.source, m.destination, m.is_bound) for m in window.messages] == [(0, 1, False)] * 2
    assert sorted(m.seconds for m in window.messages) == [1.75, 2.5]
    assert {m.bytes for m in window.messages} == {8192}
    assert window.step_s == 1.5


def test_of_two_spans_by_devices_the_shorter_is_that_of_the_message() -> None:
    sent = [replace(end(1, is_send=True, began_s=5.0, ended_s=5.25), by_device=True)]
    taken = [replace(end(0, is_send=False, began_s=80.0, ended_s=83.0), by_device=True)]
    (moved,) = joined(tables(sent, taken), (0, 1)).messages
    assert moved.seconds == 0.25


@given(st.lists(st.floats(-1e4, 1e4), min_size=2, max_size=6), st.data())
def test_clocks_of_machines_are_compared_by_messages_both_ways(
    offsets: list[float], data: st.DataObject
) -> None:
    ranks = len(offsets)
    machines = [data.draw(st.integers(0, 2)) for _ in offsets]
    by_machine = dict(zip(machines, offsets, strict=True))
    clocks = [by_machine[machine] for machine in machines]
    delay_s = 0.001
    ring = [
        NeighbourTimes(
            machines[rank],
            clocks[rank] - clocks[rank - 1] + delay_s,
            clocks[rank] - clocks[(rank + 1) % ranks] + delay_s,
        )
        for rank in range(ranks)
    ]
    found = clock_offsets(ring)
    assert found == pytest.approx([clock - clocks[0] for clock in clocks], abs=1e-6)
    # A message between the first rank and the last, whose clocks differ.
    sent = [end(ranks - 1, is_send=True, began_s=clocks[0] + 10.0)]
    taken = [end(0, is_send=False, began_s=clocks[-1] + 9.5, ended_s=clocks[-1] + 10.25)]
    ends = [sent, *[[]] * (ranks - 2), taken]
    (moved,) = joined(tables(*ends, near=ring), range(ranks)).messages
    assert moved.seconds == pytest.approx(0.25, abs=1e-5)


def test_a_message_of_which_one_end_is_told_is_no_evidence() -> None:
    one = [end(1, is_send=True, began_s=1.0)]
    other = [end(0, is_send=False, began_s=1.0, turn=1), end(2, is_send=False, began_s=1.0)]
    assert joined(tables(one, other, []), (0, 1, 2)).messages == []


def test_links_within_a_machine_and_between_machines_are_of_two_kinds() -> None:
    ends = [[end((rank + 1) % 3, is_send=True, began_s=1.0)] for rank in range(3)]
    for rank in range(3):
        ends[rank].append(end((rank - 1) % 3, is_send=False, began_s=1.0))
    near = [NeighbourTimes(machine, 0.0, 0.0) for machine in (1, 1, 2)]
    found = joined(tables(*ends, near=near), (0, 1, 2)).messages
    assert {m.source: m.kind.rpartition(" ")[2] for m in found} == {0: "near", 1: "far", 2: "far"}


def test_the_newest_messages_of_each_edge_are_told_and_stand_for_all() -> None:
    many = [end(1, is_send=True, began_s=0.0, turn=turn) for turn in range(32)]
    taken = [
        end(0, is_send=False, began_s=1.0, ended_s=2.0 + turn, turn=turn) for turn in range(32)
    ]
    window = joined(tables(many, taken), (0, 1))
    assert sorted(m.seconds for m in window.messages) == [1.0 + turn for turn in range(16, 32)]
    assert sum(m.stands_for for m in window.messages) == pytest.approx(32)


def test_many_ranks_tell_less_each() -> None:
    assert rows_of(2) == 64
    assert rows_of(16) == 480
    assert rows_of(64) == 512
    assert 1024 * rows_of(1024) <= 1 << 16


@given(st.integers(2, 64), st.data())
def test_a_suspected_link_is_tried_over_its_stride(ranks: int, data: st.DataObject) -> None:
    source = data.draw(st.integers(0, ranks - 1))
    target = data.draw(st.integers(0, ranks - 1).filter(lambda rank: rank != source))
    found = strides(ranks, [(source, target)])
    assert (target - source) % ranks in found
    assert len(set(found)) == len(found) > (ranks > 2)
    assert all(0 < stride < ranks for stride in found)


def test_the_recorder_tells_the_ends_of_a_window_with_their_turns() -> None:
    recorder = FlightRecorder(0, slots=8)
    group = recorder.group("data")

    def post(tag: int, size: int = 4096, *, waits: bool = False) -> None:
        number = recorder.post(group, "send", "send", 1, size, tag)
        recorder.started(number)
        if waits:
            recorder.waiting(number)
        recorder.finished(number)

    post(7)
    since = recorder.begin_window()
    assert recorder.message_ends(since, 1) == []
    for tag, size in ((7, 4096), (7, 100), (7, 4096), (8, 4096)):
        post(tag, size)
    recorder.post(group, "send", "send", 1, 4096, 7)  # has not ended
    recorder.post(group, "all_reduce", "collective", -1, 4096, 7)
    found = recorder.message_ends(since, 1024)
    assert [(e.tag, e.turn, e.peer, e.is_send) for e in found] == [
        (7, 0, 1, True),
        (7, 2, 1, True),
        (8, 0, 1, True),
    ]
    assert all(e.ended_s >= e.began_s and not e.is_bound for e in found)
    number = recorder.post(group, "send", "send", 1, 4096, 9)
    recorder.started(number)
    recorder.finished(number)
    recorder.timed(number, 2.5)
    last = recorder.message_ends(since, 1024)[-1]
    assert last.by_device
    assert last.ended_s - last.began_s == pytest.approx(2.5)
    for _ in range(9):
        post(9)
    assert len(recorder.message_ends(since, 1024)) == 8


@given(st.integers(2, 40), st.data())
def test_no_rank_sends_while_it_receives(ranks: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, ranks - 1))
    sent = set()
    for turn in range(3):
        senders = {at for at in range(ranks) if roles(at, ranks, stride, turn)[0]}
        receivers = {at for at in range(ranks) if roles(at, ranks, stride, turn)[1]}
        assert receivers == {(at + stride) % ranks for at in senders}
        assert not senders & receivers
        assert not senders & sent
        sent |= senders
    assert sent == set(range(ranks))
