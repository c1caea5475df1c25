"""Agents and workers as real processes: a killed, stopped or hung one is noticed and replaced."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import time
from pathlib import Path

import pytest

from holdfast.launch.agent.restarts import RestartPolicy
from support.runs.elastic_demo import Run, demonstration, is_running, parent_of, wait_for

pytestmark = [pytest.mark.mp, pytest.mark.chaos]


def test_a_run_without_trouble_is_one_generation(tmp_path: Path) -> None:
    with demonstration(tmp_path, 3, steps=20) as run:
        run.start_node("a", (0, 1, 2))
        assert run.exit_code("a") == 0
        assert [run.step(rank) for rank in range(3)] == [20] * 3
        assert [len(run.records(rank, "generation")) for rank in range(3)] == [1] * 3


def test_a_killed_worker_is_replaced_and_no_step_is_lost(tmp_path: Path) -> None:
    with demonstration(tmp_path, 4) as run:
        run.start_node("a", (0, 1))
        run.start_node("b", (2, 3))
        first = run.reach(0, ["0", "1", "2", "3"])
        run.more_steps(0)
        os.kill(run.pid(2), signal.SIGKILL)
        for rank in range(4):
            run.reach(rank, ["0", "1", "2.1", "3"], after=first["number"])
        run.more_steps(0)
        for rank in (0, 1, 3):
            steps = [record["step"] for record in run.records(rank, "step")]
            assert steps == sorted(set(steps))
        run.check_history(range(4))


def test_a_stopped_worker_is_killed_and_replaced(tmp_path: Path) -> None:
    with demonstration(tmp_path, 3) as run:
        run.start_node("a", (0, 1, 2))
        first = run.reach(0, ["0", "1", "2"])
        stopped = run.pid(1)
        os.kill(stopped, signal.SIGSTOP)
        run.reach(0, ["0", "1.1", "2"], after=first["number"])
        assert not is_running(stopped)
        log = (tmp_path / "a.log").read_text()
        assert "rank 1 is killed: stopped by a signal" in log or "killed: no heartbeat" in log


def test_a_worker_that_holds_the_interpreter_is_killed_and_replaced(tmp_path: Path) -> None:
    with demonstration(tmp_path, 3) as run:
        run.heartbeat_timeout_ms = 20_000  # it may lack a processor for longer than usual
        run.start_node("a", (0, 1, 2))
        first = run.reach(0, ["0", "1", "2"])
        run.fault("2", "hold-lock")
        run.reach(0, ["0", "1", "2.1"], after=first["number"])
        assert "its interpreter has not run" in (tmp_path / "a.log").read_text()
        assert "no heartbeat" not in (tmp_path / "a.log").read_text()


def test_a_worker_that_all_others_wait_for_is_killed_and_replaced(tmp_path: Path) -> None:
    with demonstration(tmp_path, 4) as run:
        run.start_node("a", (0, 1))
        run.start_node("b", (2, 3))
        first = run.reach(0, ["0", "1", "2", "3"])
        run.fault("3", "hang")
        run.reach(0, ["0", "1", "2", "3.1"], after=first["number"])
        log = (tmp_path / "b.log").read_text()
        assert re.search(r"rank 3 is killed: hung: rank 0 has waited \d+\.\d s for rank 3", log)


def test_the_others_go_on_when_a_node_dies(tmp_path: Path) -> None:
    with demonstration(tmp_path, 6) as run:
        for node, ranks in (("a", (0, 1)), ("b", (2, 3)), ("c", (4, 5))):
            run.start_node(node, ranks)
        first = run.reach(2, [str(rank) for rank in range(6)])
        workers = [run.pid(0), run.pid(1)]
        run.nodes["a"].kill()  # hosts the generation's store, too
        for rank in (2, 3, 4, 5):
            run.reach(rank, ["2", "3", "4", "5"], after=first["number"])
        wait_for(lambda: not any(map(is_running, workers)), "the orphans to end")
        run.start_node("a", (0, 1), founder=False, incarnation=7)
        run.reach(2, ["0.7", "1.7", "2", "3", "4", "5"])
        run.check_history(range(6))


def test_a_worker_that_fails_on_its_own_is_replaced(tmp_path: Path) -> None:
    with demonstration(tmp_path, 2) as run:
        run.start_node("a", (0, 1))
        run.reach(0, ["0", "1"])
        run.fault("0", "exit")
        run.reach(1, ["0.1", "1"])
        assert "exited with code 7" in (tmp_path / "a.log").read_text()


def test_an_agent_gives_up_when_restarts_make_no_progress(tmp_path: Path) -> None:
    with demonstration(tmp_path, 2) as run:
        run.start_node("a", (0, 1))
        run.reach(0, ["0", "1"])
        run.min_ranks = 2
        (tmp_path / "0.crash").touch()
        (tmp_path / "1.crash").touch()
        for rank in (0, 1):
            os.kill(run.pid(rank), signal.SIGKILL)
        assert run.exit_code("a") == 30
        assert "restarted 3 times with no step committed" in (tmp_path / "a.log").read_text()


def test_a_node_that_is_told_to_go_is_let_go_first(tmp_path: Path) -> None:
    with demonstration(tmp_path, 4) as run:
        run.start_node("a", (0, 1))
        run.start_node("b", (2, 3))
        run.reach(0, ["0", "1", "2", "3"])
        assert run.nodes["b"].pid is not None
        os.kill(run.nodes["b"].pid, signal.SIGTERM)
        assert run.exit_code("b") == 3
        run.reach(0, ["0", "1"])
        announced = [rank for record in run.records(0, "generation") for rank in record["leaving"]]
        assert sorted(announced) == [2, 3]
        assert not run.records(2, "gave up")


def test_an_interrupt_ends_workers_and_agent(tmp_path: Path) -> None:
    with demonstration(tmp_path, 2) as run:
        run.start_node("a", (0, 1))
        run.reach(0, ["0", "1"])
        workers = [run.pid(0), run.pid(1)]
        assert run.nodes["a"].pid is not None
        os.kill(run.nodes["a"].pid, signal.SIGINT)
        assert run.exit_code("a") == 130
        assert not any(map(is_running, workers))


def test_half_of_a_machine_goes_on_because_the_other_half_is_known_to_be_dead(
    tmp_path: Path,
) -> None:
    with demonstration(tmp_path, 4) as run:
        machine = run.start_machine({"a": (0, 1), "b": (2, 3)})
        first = run.reach(2, ["0", "1", "2", "3"])
        workers = [run.pid(0), run.pid(1)]
        os.kill(parent_of(parent_of(workers[0])), signal.SIGKILL)
        for rank in (2, 3):
            run.reach(rank, ["2", "3"], after=first["number"])
        assert not any(map(is_running, workers))
        assert "node a is lost" in (tmp_path / "machine.log").read_text()
        assert machine.pid is not None
        os.kill(machine.pid, signal.SIGINT)
        assert run.exit_code("machine") == 130


@pytest.mark.parametrize("nodes", [{"a": (0, 1, 2, 3)}, {"a": (0, 1), "b": (2, 3)}])
def test_a_machine_with_its_own_lighthouse_ends_with_0(
    tmp_path: Path, nodes: dict[str, tuple[int, ...]]
) -> None:
    with demonstration(tmp_path, 4, steps=10) as run:
        run.start_machine(nodes)
        assert run.exit_code("machine") == 0
        assert [run.step(rank) for rank in range(4)] == [10] * 4


def test_nothing_is_left_when_the_fork_server_is_killed(tmp_path: Path) -> None:
    with demonstration(tmp_path, 2) as run:
        run.start_node("a", (0, 1))
        run.reach(0, ["0", "1"])
        workers = [run.pid(0), run.pid(1)]
        os.kill(parent_of(workers[0]), signal.SIGKILL)
        assert run.exit_code("a") == 3
        wait_for(lambda: not any(map(is_running, workers)), "the workers to end")


def test_a_stopped_agent_that_hosts_the_store_is_lost_and_the_others_go_on(tmp_path: Path) -> None:
    with demonstration(tmp_path, 6) as run:
        for node, ranks in (("a", (0, 1)), ("b", (2, 3, 4, 5))):
            run.start_node(node, ranks)
        first = run.reach(2, [str(rank) for rank in range(6)])
        agent, workers = run.nodes["a"].pid, [run.pid(0), run.pid(1)]
        assert agent is not None
        os.kill(agent, signal.SIGSTOP)
        os.kill(run.pid(5), signal.SIGKILL)  # its death cannot be told through that store
        run.reach(2, ["2", "3", "4", "5.1"], after=first["number"])
        wait_for(lambda: not any(map(is_running, workers)), "the workers of the node to end")
        wait_for(lambda: not run.nodes["a"].is_alive(), "the stopped agent to end")


def test_a_stopped_fork_server_ends_its_node(tmp_path: Path) -> None:
    with demonstration(tmp_path, 2) as run:
        run.start_node("a", (0, 1))
        run.reach(0, ["0", "1"])
        os.kill(parent_of(run.pid(0)), signal.SIGSTOP)
        os.kill(run.pid(1), signal.SIGKILL)  # whose end is not reported
        assert run.exit_code("a") == 3


def test_what_a_worker_started_ends_with_it(tmp_path: Path) -> None:
    with demonstration(tmp_path, 2) as run:
        run.start_node("a", (0, 1))
        run.reach(0, ["0", "1"])
        run.fault("1", "start-child")
        child = wait_for(lambda: run.records(1, "child"), "the child")[0]["pid"]
        os.kill(run.pid(1), signal.SIGKILL)
        run.reach(0, ["0", "1.1"])
        wait_for(lambda: not is_running(child), "the child to end")


@pytest.mark.slow
def test_faults_at_random_instants_leave_one_history_and_nothing_else(tmp_path: Path) -> None:
    """Kills and stops, single ranks and pairs, also during agreement and joining."""
    chance = random.Random(4)
    patient = RestartPolicy(limit=1000, first_s=0.01, longest_s=0.01)
    """Where processors are busy, many are hit before a step is committed."""
    with demonstration(tmp_path, 6) as run:
        nodes = {"a": (0, 1, 2), "b": (3, 4, 5)}
        agents = [run.start_node(name, nodes[name], restarts=patient) for name in nodes]
        first = run.reach(0, [str(rank) for rank in range(6)])
        used: list[list[tuple[int, int]]] = []
        for _ in range(3):
            for _ in range(8):
                for rank in chance.sample(range(6), chance.choice([1, 1, 2])):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(
                            run.pid(rank), chance.choice([signal.SIGKILL] * 3 + [signal.SIGSTOP])
                        )
                time.sleep(chance.uniform(0.0, 0.5))
            wait_for(lambda: _is_settled(run), "all ranks to train together", run.describe)
            used.append([_resources(agent.pid or 0) for agent in agents])

        def keeps_nothing() -> bool:
            """16 faults later; a few may still be in hand, and what leaks stays."""
            now = [_resources(agent.pid or 0) for agent in agents]
            return all(
                after[0] <= before[0] + 12 and after[1] <= before[1] + 4
                for before, after in zip(used[0], now, strict=True)
            )

        wait_for(keeps_nothing, "the agents to let go of what faults took")
        assert run.generation(0)["number"] > first["number"]
        run.check_history(range(6))
        steps = sorted(
            {record["step"] for rank in range(6) for record in run.records(rank, "step")}
        )
        assert steps == list(range(1, steps[-1] + 1))


def _is_settled(run: Run) -> bool:
    newest = [run.generation(rank) for rank in range(6)]
    together = len(newest[0]["members"]) == 6 and all(
        n["prefix"] == newest[0]["prefix"] for n in newest
    )
    return together and all(
        any(r["generation"] == newest[0]["number"] for r in run.records(rank, "step")[-5:])
        and is_running(run.pid(rank))
        for rank in range(6)
    )


def _resources(pid: int) -> tuple[int, int]:
    descriptors = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    return descriptors, len(list(Path(f"/proc/{pid}/task").iterdir()))
