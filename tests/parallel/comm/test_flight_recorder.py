"""The flight recorder's marks of steps and of work without messages."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from holdfast.parallel.comm.flight_recorder import (
    _RING_AT,
    _SLOT,
    FlightRecorder,
    parse_record,
    read_record,
)


def test_a_rank_says_what_it_does_and_until_when_and_when_that_has_ended(tmp_path: Path) -> None:
    path = tmp_path / "page"
    recorder = FlightRecorder(3, path=path)
    assert read_record(path).busy is None
    before_s = time.monotonic()
    with recorder.busy("save", 50.0):
        found = read_record(path)
        assert found.busy == "save"
        assert before_s + 50.0 <= found.busy_until_s <= time.monotonic() + 50.0
    found = read_record(path)
    assert found.busy is None
    assert before_s <= found.busy_ended_s <= time.monotonic()


def test_a_mark_inside_another_keeps_the_longer_time_and_gives_the_outer_back() -> None:
    recorder = FlightRecorder(0)
    with recorder.busy("report", 10.0):
        outer_s = recorder.record().busy_until_s
        with recorder.busy("save", 600.0):
            assert recorder.record().busy == "save"
            assert recorder.record().busy_until_s > outer_s + 500.0
        with recorder.busy("read", 1.0):
            assert recorder.record().busy_until_s == outer_s
        assert (recorder.record().busy, recorder.record().busy_until_s) == ("report", outer_s)
    assert recorder.record().busy is None


def test_a_mark_ends_with_an_error_in_its_block() -> None:
    recorder = FlightRecorder(0)
    try:
        with recorder.busy("load", 10.0):
            raise ValueError
    except ValueError:
        pass
    assert recorder.record().busy is None


def test_the_step_of_a_record_is_the_newest_that_has_begun() -> None:
    recorder = FlightRecorder(0)
    assert recorder.record().step == 0
    for step in (41, 42, 43):
        recorder.note_step(step)
    assert recorder.record().step == 43
    assert len(recorder.record().step_starts_s) == 3


def test_the_operations_that_are_waited_for_are_those_among_all_that_are_open() -> None:
    """The ring has room for 8, of which 11 operations overwrite 3; they are in the calls' order."""
    recorder = FlightRecorder(0, slots=8)
    group = recorder.group("data")
    for number in range(1, 12):
        assert recorder.post(group, "send", "send", 1, 100, number) == number
        if number != 7:  # nobody waits for it yet
            recorder.waiting(number)
        if number % 3 == 0:
            recorder.finished(number, failed=number == 9)
    data = bytes(recorder._memory)
    recorder.post(group, "send", "send", 1, 100, 12)  # in the place of operation 4
    record = parse_record(data, bytes(recorder._memory))
    assert [(o.number, o.tag, o.group) for o in record.operations] == [
        (number, number, "data") for number in range(5, 12)
    ]
    assert [o.outcome for o in record.operations if o.number in (6, 9)] == ["done", "failed"]
    assert [o.number for o in record.waited_for] == [5, 8, 10, 11]
    assert all(o.is_waited_for for o in record.waited_for)


@pytest.mark.parametrize("word", [1, 2, 3, 7], ids=["group", "operation", "direction", "outcome"])
def test_a_code_of_nothing_is_found_before_the_operation_is_asked_for(word: int) -> None:
    recorder = FlightRecorder(0, slots=8)
    recorder.post(recorder.group("data"), "send", "send", 1, 100, 0)
    for code in (-1, 99):
        recorder._words[_RING_AT + _SLOT + word] = code
        with pytest.raises(ValueError, match=f"unknown code {code}"):
            recorder.record()


def test_a_rank_that_waits_for_something_else_now_does_not_wait_for_the_operation() -> None:
    recorder = FlightRecorder(0)
    group = recorder.group("world")
    first, second = (recorder.post(group, "receive", "receive", 1, 8, tag) for tag in (1, 2))
    recorder.waiting(first)
    recorder.waits_no_more(first)
    recorder.waiting(second)
    assert [operation.tag for operation in recorder.record().waited_for] == [2]
