"""The watch over the workers of one machine: which are killed, when, and the report of it."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from holdfast.launch.launchers.interrupt import going_on
from holdfast.launch.launchers.local import WorkerEnd, start_workers, watch_workers
from holdfast.trainer.run import RunDirectory
from holdfast.trainer.worlds import WorldInfo
from support.processes.fake_system import FakeSystem

RANKS = {11: 0, 12: 1, 13: 2}


def killed(system: FakeSystem) -> set[int]:
    return {pid for name, pid in system.log if name == "SIGKILL"}


def test_when_one_worker_fails_the_others_are_killed_a_moment_later_and_not_blamed() -> None:
    system = FakeSystem(codes={12: 1})
    ends = watch_workers(RANKS, exit_s=60.0, system=system)
    assert ends == [WorkerEnd(1, 1), WorkerEnd(0, 0), WorkerEnd(2, 0)]
    assert killed(system) == {11, 13}
    assert 0.4 < system.time_s < 1.0


def test_workers_that_fail_with_the_first_keep_their_codes() -> None:
    def also_fails(now_s: float) -> None:
        if now_s > 0.3:
            system.codes[13] = 4

    system = FakeSystem(codes={12: 1}, on_wait=also_fails)
    ends = watch_workers(RANKS, exit_s=60.0, system=system)
    assert ends == [WorkerEnd(1, 1), WorkerEnd(2, 4), WorkerEnd(0, 0)]


def test_a_worker_that_is_found_killed_together_with_those_that_miss_it_was_not_killed_here() -> (
    None
):
    system = FakeSystem(codes={11: 3, 13: -signal.SIGKILL})
    ends = watch_workers(RANKS, exit_s=60.0, system=system)
    assert ends == [WorkerEnd(0, 3), WorkerEnd(2, -signal.SIGKILL), WorkerEnd(1, 0)]
    assert killed(system) == {12}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_workers_that_were_told_to_end_have_their_time_though_one_has_ended(
    number: signal.Signals,
) -> None:
    def happen(now_s: float) -> None:
        if not system.codes:
            signal.raise_signal(number)
            system.codes[11] = 3

    system = FakeSystem(on_wait=happen)
    ends = watch_workers(RANKS, exit_s=20.0, system=system)
    assert {pid for name, pid in system.log if name == number.name} == {11, 12, 13}
    assert killed(system) == {12, 13}
    assert 20.0 <= system.time_s < 21.0
    if number == signal.SIGINT:
        assert {end.code for end in ends} == {-signal.SIGINT}
    else:
        assert ends == [WorkerEnd(0, 3), WorkerEnd(1, 0), WorkerEnd(2, 0)]


def test_an_interrupted_worker_has_all_the_time_it_needs_and_a_second_interrupt_kills_it() -> None:
    sent: list[float] = []

    def happen(now_s: float) -> None:
        if not sent or (len(sent) == 1 and now_s > 1000.0):
            sent.append(now_s)
            signal.raise_signal(signal.SIGINT)

    system = FakeSystem(on_wait=happen)
    ends = watch_workers(RANKS, exit_s=20.0, system=system)
    assert {pid for name, pid in system.log if name == "SIGINT"} == {11, 12, 13}
    assert killed(system) == {11, 12, 13}
    assert 1000.0 < system.time_s < 1001.0
    assert {end.code for end in ends} == {-signal.SIGINT}


def test_workers_that_finish_though_interrupted_have_finished() -> None:
    def happen(now_s: float) -> None:
        if not system.codes:
            signal.raise_signal(signal.SIGINT)
            system.codes = {11: 0, 12: 0, 13: 0}

    system = FakeSystem(on_wait=happen)
    assert [end.code for end in watch_workers(RANKS, exit_s=1.0, system=system)] == [0, 0, 0]


def test_the_command_that_goes_on_is_one_that_a_shell_takes(tmp_path: Path) -> None:
    root = tmp_path / "my run"
    again = f"holdfast resume '{root}'"
    assert going_on(["/bin/holdfast", "train", "c.toml", "--resume", "none"], root) == again
    assert going_on(["holdfast", "resume", "my run"], root) == again
    assert going_on(["holdfast", "replay", "x"], root) == "the same command"


def test_sigusr1_reaches_the_workers_and_ends_none() -> None:
    def happen(now_s: float) -> None:
        if len(system.waited_s) == 1:
            signal.raise_signal(signal.SIGUSR1)
        if now_s > 100.0:
            system.codes = {11: 0, 12: 0, 13: 0}

    system = FakeSystem(on_wait=happen)
    assert [end.code for end in watch_workers(RANKS, exit_s=1.0, system=system)] == [0, 0, 0]
    assert [pid for name, pid in system.log if name == "SIGUSR1"] == [11, 12, 13]
    assert killed(system) == set()


def test_a_worker_that_ends_with_0_and_without_its_word_has_failed() -> None:
    system = FakeSystem(codes={11: 0, 12: 0})
    ends = watch_workers(RANKS, exit_s=60.0, system=system, has_finished=lambda rank: rank == 0)
    assert ends == [WorkerEnd(0, 0), WorkerEnd(1, 3, is_silent=True), WorkerEnd(2, 0)]
    assert killed(system) == {13}


@pytest.mark.mp
def test_only_a_worker_that_returns_says_that_it_is_done(tmp_path: Path) -> None:
    def main(world: WorldInfo) -> int:
        if world.rank == 1:
            os._exit(0)
        return 0

    ends = start_workers(main, 2, RunDirectory(tmp_path))
    assert sorted((end.rank, end.is_silent, end.code) for end in ends) == [
        (0, False, 0),
        (1, True, 3),
    ]
