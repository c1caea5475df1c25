"""How long the tasks of a job wait for one another before a run begins: with the test's clock."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from holdfast.launch.launchers.cluster import MEET_S, ask_first, tell_others
from holdfast.parallel.errors import ConfigError
from holdfast.parallel.links import ask, listen
from holdfast.parallel.reading import decode_json
from holdfast.trainer.config import RunConfig
from holdfast.trainer.run.run_directory import RunAnswer, told_run
from holdfast.trainer.worlds.world import WorldInfo, local_world
from support.processes.fake_clock import FakeClock
from support.runs.small_runs import make_config

CONFIG = make_config()


def world_of(rank: int, port: int) -> WorldInfo:
    return replace(
        local_world(rank, 3, port, "a secret of the job"), store_host="127.0.0.1", job="7"
    )


def unused_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


def test_a_first_task_that_does_not_answer_is_asked_again_until_time_is_up(
    capfd: pytest.CaptureFixture[str],
) -> None:
    clock = FakeClock()
    begin = clock()
    port = unused_port()
    with pytest.raises(ConfigError, match=r"did not answer within 120 s: .*refused.*MASTER_ADDR"):
        ask_first(world_of(1, port), CONFIG, clock=clock, sleep=clock.sleep)
    assert clock() - begin == pytest.approx(MEET_S, abs=2)
    assert len(clock.slept_s) > 10
    (told,) = capfd.readouterr().err.splitlines()  # once
    assert told.startswith(f"holdfast: waiting for the first task at 127.0.0.1:{port} since 5 s")


def in_thread(world: WorldInfo, answers: list[Any], config: RunConfig = CONFIG) -> threading.Thread:
    """A task that asks the first one."""

    def body() -> None:
        try:
            answers.append(ask_first(world, config, sleep=lambda _: time.sleep(0.01))[0])
        except ConfigError as error:
            answers.append(str(error))

    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    return thread


def _asks(world: WorldInfo, task: int) -> None:
    with contextlib.suppress(OSError, EOFError):
        ask(world.store_host, world.store_port, world.meeting_key, task, 30.0)


def test_tasks_that_do_not_come_in_time_are_named_and_those_of_another_job_do_not_count() -> None:
    clock, answers = FakeClock(), list[Any]()
    listening = listen("127.0.0.1")
    world = world_of(0, listening.getsockname()[1])
    first = threading.Thread(target=_asks, args=(world, 1), daemon=True)
    first.start()
    time.sleep(0.2)  # so that task 1 is the first to be served
    other = in_thread(replace(world, rank=2, job="8"), answers)

    def later() -> float:
        return clock() + (0.0 if other.is_alive() else MEET_S)

    with pytest.raises(ConfigError, match=r"tasks \[2\] have not come within 120 s"):
        tell_others(listening, world, RunAnswer(), CONFIG, clock=later)
    assert "is not the first task of this job" in str(answers[0])


def test_a_name_that_does_not_resolve_is_asked_again_until_time_is_up() -> None:
    clock = FakeClock()
    world = replace(world_of(1, 29500), store_host="no-such-host.invalid")
    with pytest.raises(ConfigError, match=r"first task at no-such-host.invalid:29500 did not ans"):
        ask_first(world, CONFIG, clock=clock, sleep=lambda seconds: clock.sleep(30.0))


def test_strangers_do_not_keep_the_tasks_from_meeting() -> None:
    answers: list[Any] = []
    listening = listen("127.0.0.1")
    world = replace(world_of(0, listening.getsockname()[1]), world_size=2)
    there = ("127.0.0.1", world.store_port)
    with (
        socket.create_connection(there),
        socket.create_connection(there) as second,
        socket.create_connection(there) as third,
    ):
        second.sendall(b'{"task": 1, "job": "7"}\n' * 10)
        third.sendall(b"\xff" * 4096)
        task = in_thread(replace(world, rank=1), answers)
        tell_others(listening, world, RunAnswer(root="here"), CONFIG)
        task.join(10)
    assert [told_run(answer)[0].root for answer in answers] == [Path("here")]


def test_the_port_is_free_after_the_meeting_though_processes_were_forked_before() -> None:
    listening = listen("127.0.0.1")
    inherited = listening.dup()
    world = replace(world_of(0, listening.getsockname()[1]), world_size=1)
    tell_others(listening, world, RunAnswer(), CONFIG)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", world.store_port), 5)
    inherited.close()


def test_every_task_is_told_which_keys_differ() -> None:
    answers: list[Any] = []
    listening = listen("127.0.0.1")
    world = world_of(0, listening.getsockname()[1])
    other = make_config(optimizer={"lr": 0.5}, log={"every": 9}, parallel={"data": 2})
    tasks = [
        in_thread(replace(world, rank=1), answers),
        in_thread(replace(world, rank=2), answers, other),
    ]
    with pytest.raises(ConfigError) as caught:
        tell_others(listening, world, RunAnswer(root="here"), CONFIG)
    for task in tasks:
        task.join(10)
    for told in (*(decode_json(answer, RunAnswer).error for answer in answers), str(caught.value)):
        assert told == (
            "optimizer.lr: 0.01 on task 0 and task 1, 0.5 on task 2; "
            "start all with the same file and the same --set\n"
            "parallel.data: 1 on task 0 and task 1, 2 on task 2; "
            "start all with the same file and the same --set"
        )
    assert len(answers) == 2
