"""A node that is sick is not let in to a run under way, which goes on with the same bits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from holdfast.launch.health import admission
from holdfast.launch.launchers.nodes import node_name
from support.network.elastic_network import network
from support.processes.cluster import Cluster
from support.runs.elastic_runs import LONGEST_S, Starter, Task, bits_of, pace
from support.runs.small_runs import make_config, run_training

pytestmark = [pytest.mark.mp, pytest.mark.slow]

TRAIN = {"steps": 20, "global_batch": 4}
MODEL = {"layers": 2}
HEALTH = {"health": "start"}
WRONG_BITS = ("env", "MKL_CBWR=COMPATIBLE")
"""Another code of the same processor for the same products."""
FULL_DISK = (
    *("unshare", "--mount", "sh", "-c"),
    'mount -t tmpfs -o size=64k tmpfs "$0/checkpoints" && exec "$@"',
)
"""A disk of 64 KiB, on this node alone, where the run has its checkpoints."""
SLOWEST_PACE_S = 2.0


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Starter]:
    starter = Starter(tmp_path)
    yield starter
    starter.close()


@pytest.fixture(scope="module")
def expected(cluster: Cluster) -> dict[str, Any]:
    return bits_of(run_training(cluster, make_config(train=TRAIN, model=MODEL)))


def test_sick_nodes_are_refused_and_the_run_goes_on(
    start: Starter, expected: dict[str, Any]
) -> None:
    run = start(
        train=TRAIN,
        model=MODEL,
        parallel={"data": 2},
        elastic=pace({"local_nodes": 2, **HEALTH}, SLOWEST_PACE_S),
    )
    run.wait_for_step(1)
    assert (run.root / "health.json").is_file()
    wrong = start.join(run, launcher=WRONG_BITS)
    assert wrong.wait(LONGEST_S) == 2
    (run.root / "checkpoints").mkdir(exist_ok=True)
    full = start.join(run, launcher=(*FULL_DISK, str(run.root)))
    code = full.wait(LONGEST_S)
    joined = sorted(run.root.parent.glob(f"{run.root.name}-joined-*.txt"))
    told = [path.read_text() for path in joined]
    if code in (1, 32):  # of unshare and mount
        pytest.skip(f"no file system can be mounted (root is needed): {told[1]}")
    assert code == 2
    refused = run.events("node_refused")
    assert ["bits of a product, cores" in event["reason"] for event in refused] == [True, False]
    assert "room, checkpoints" in refused[1]["reason"]
    assert "64.0 KiB are free" in refused[1]["reason"]
    for event, text in zip(refused, told, strict=True):
        assert f"holdfast: node {event['node']} is not let in: " in text
    run.pace(0.0)
    assert run.finish() == 0, run.output()
    assert run.bits() == expected
    assert not run.events("rank_joined")
    assert not run.events("newcomer_refused")
    assert run.output().count("is not let in: ") == 2


def test_a_job_does_not_begin_with_a_sick_node(start: Starter) -> None:
    path = start.write("job", train=TRAIN, model=MODEL, parallel={"data": 3}, elastic=HEALTH)
    with network("abc") as net:
        sick = start.task(path, "job", Task(net, 1), inside=WRONG_BITS)
        well = start.task(path, "job", Task(net, 2))
        run = start.start(path, "job", task=Task(net, 0))
        assert run.finish() == 2
        assert [sick.wait(LONGEST_S), well.wait(LONGEST_S)] == [2, 2]
    refused = {event["node"]: event["reason"] for event in run.events("node_refused")}
    assert [node for node, reason in refused.items() if "bits of a product" in reason] == [
        node_name((1,))
    ]
    assert not run.events("worker_started")
    assert not (run.root / "health.json").exists()
    for name in ("job", "job-task-1", "job-task-2"):
        text = (run.root.parent / f"{name}.txt").read_text()
        assert f"node {node_name((1,))} is not let in: " in text


def test_checks_that_do_not_end_or_fail_are_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that stands for the checks: one that sleeps, and one that says why it ends."""
    python = tmp_path / "python"
    monkeypatch.setattr("sys.executable", str(python))
    for body, reason in (
        ("exec sleep 600", "its checks have not ended within 0.2 s"),
        ("echo holdfast: no device >&2; exit 2", "its checks have failed: holdfast: no device"),
        ("exit 7", "its checks have failed: exit code 7"),
    ):
        python.write_text(f"#!/bin/sh\n{body}\n")
        python.chmod(0o755)
        limit_s = 0.2 if "sleep" in body else admission.CHECK_S
        monkeypatch.setattr(admission, "CHECK_S", limit_s)
        report = admission.own_report(make_config(), tmp_path / "run", "n")
        assert report.failures == (f"health: {reason}",)
        monkeypatch.undo()
        monkeypatch.setattr("sys.executable", str(python))
