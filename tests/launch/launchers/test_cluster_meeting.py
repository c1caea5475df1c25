"""How long the tasks of a job wait for one another before a run begins: with the test's clock."""

from __future__ import annotations

import socket
from dataclasses import replace

import pytest

from holdfast.launch.launchers.cluster import MEET_S, ask_first, tell_others
from holdfast.parallel.errors import ConfigError
from holdfast.trainer.worlds.world import WorldInfo, local_world
from support.processes.fake_clock import FakeClock


def world_of(rank: int, port: int) -> WorldInfo:
    return replace(local_world(rank, 3), store_host="127.0.0.1", store_port=port, job="7")


def unused_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


def test_a_first_task_that_does_not_answer_is_asked_again_until_time_is_up() -> None:
    clock = FakeClock()
    begin = clock()
    with pytest.raises(ConfigError, match=r"did not answer within 120 s: .*refused.*MASTER_ADDR"):
        ask_first(world_of(1, unused_port()), clock=clock, sleep=clock.sleep)
    assert clock() - begin == pytest.approx(MEET_S, abs=2)
    assert len(clock.slept_s) > 10


def test_tasks_that_do_not_come_in_time_are_named_and_those_of_another_job_do_not_count() -> None:
    clock = FakeClock()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        world = world_of(0, listening.getsockname()[1])
        lines = []
        for hello in (b'{"task": 1, "job": "7"}\n', b'{"task": 2, "job": "8"}\n'):
            lines.append(socket.create_connection(("127.0.0.1", world.store_port)))
            lines[-1].sendall(hello)
        looks = iter([0.0, 1.0, 2.0, MEET_S])

        def later() -> float:
            return clock() + next(looks)

        with pytest.raises(ConfigError, match=r"tasks \[2\] have not come within 120 s"):
            tell_others(listening, world, {}, clock=later)
        for line in lines:
            line.close()
