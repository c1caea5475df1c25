"""How long the tasks of a job wait for one another before a run begins: with the test's clock."""

from __future__ import annotations

import socket
from dataclasses import replace

import pytest

from holdfast.launch.launchers import cluster
from holdfast.launch.launchers.cluster import MEET_S, ask_first, tell_others
from holdfast.parallel.errors import ConfigError
from holdfast.trainer.worlds.world import WorldInfo, local_world
from support.processes.fake_clock import FakeClock


def world_of(rank: int, port: int) -> WorldInfo:
    return replace(local_world(rank, 3), store_host="127.0.0.1", store_port=port, job="7")


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
        ask_first(world_of(1, port), clock=clock, sleep=clock.sleep)
    assert clock() - begin == pytest.approx(MEET_S, abs=2)
    assert len(clock.slept_s) > 10
    (told,) = capfd.readouterr().err.splitlines()  # once
    assert told.startswith(f"holdfast: waiting for the first task at 127.0.0.1:{port} since 5 s")


def test_tasks_that_do_not_come_in_time_are_named_and_those_of_another_job_do_not_count() -> None:
    clock = FakeClock()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        world = world_of(0, listening.getsockname()[1])
        lines = []
        for hello in (b'{"task": 1, "job": "7"}\n', b'{"task": 2, "job": "8"}\n'):
            lines.append(socket.create_connection(("127.0.0.1", world.store_port)))
            lines[-1].sendall(hello)
        looks = iter([0.0, 1.0, 2.0])

        def later() -> float:
            return clock() + next(looks, MEET_S)

        with pytest.raises(ConfigError, match=r"tasks \[2\] have not come within 120 s"):
            tell_others(listening, world, {}, clock=later)
        for line in lines:
            line.close()


def test_a_name_that_does_not_resolve_is_asked_again_until_time_is_up() -> None:
    clock = FakeClock()
    world = replace(world_of(1, 29500), store_host="no-such-host.invalid")
    with pytest.raises(ConfigError, match=r"first task at no-such-host.invalid:29500 did not ans"):
        ask_first(world, clock=clock, sleep=lambda seconds: clock.sleep(30.0))


def test_a_stranger_who_says_nothing_does_not_keep_the_tasks_from_meeting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cluster, "_HELLO_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        world = replace(world_of(0, listening.getsockname()[1]), world_size=2)
        with (
            socket.create_connection(("127.0.0.1", world.store_port)),
            socket.create_connection(("127.0.0.1", world.store_port)) as second,
        ):
            second.sendall(b'{"task": 1, "job": "7"}\n')
            tell_others(listening, world, {"root": "here"})
            assert second.makefile().readline() == '{"root": "here"}\n'
