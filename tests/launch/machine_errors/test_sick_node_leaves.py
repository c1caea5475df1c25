"""A node whose machine tells of a serious error leaves a run, which loses nothing by that."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from support.processes.cluster import Cluster
from support.processes.forked_command import ForkedCommand
from support.runs.elastic_runs import ElasticRun, Starter, bits_of, pace
from support.runs.machine_trees import MachineTree
from support.runs.small_runs import make_config, run_training

pytestmark = [pytest.mark.mp, pytest.mark.slow]

TRAIN = {"steps": 40, "global_batch": 4}
MODEL = {"layers": 2}
PACE_S = 0.5
UNCORRECTABLE = "devices/system/edac/mc/mc0/ue_count"
CORRECTED = "devices/system/edac/mc/mc0/ce_count"
PROGRAM = "import sys\nfrom support.runs.machine_trees import train_with_tree\n" + (
    "sys.exit(train_with_tree())\n"
)


def run_with_tree(folder: Path, tree: MachineTree, nodes: int) -> ElasticRun:
    """A run of two ranks on so many nodes, the first of which looks at the tree."""
    script = folder / "train.py"
    script.write_text(PROGRAM)
    path = Starter(folder).write(
        "run",
        train=TRAIN,
        model=MODEL,
        parallel={"data": 2},
        elastic=pace({"local_nodes": nodes}, PACE_S, rank=1),
    )
    process = ForkedCommand(
        (str(path), str(folder / "run"), str(tree.roots.sys.parent)),
        folder / "run.txt",
        {**os.environ, "OMP_NUM_THREADS": "1"},
        script=script,
    )
    return ElasticRun(folder / "run", process)


def test_a_node_with_an_uncorrectable_error_leaves_and_no_bit_changes(
    tmp_path: Path, cluster: Cluster
) -> None:
    tree = MachineTree(tmp_path / "machine")
    for path in (UNCORRECTABLE, CORRECTED):
        tree.count(path, 1)
    run = run_with_tree(tmp_path, tree, nodes=2)
    try:
        run.wait_for_step(2)
        tree.count(CORRECTED, 3)
        run.wait_until(lambda: bool(run.events("machine_error")), "an error is told")
        (told,) = run.events("machine_error")
        assert (told["kind"], told["device"], told["count"]) == ("memory_corrected", "mc0", 2)
        assert not told["serious"]
        assert run.members() == 2
        tree.count(UNCORRECTABLE, 2)
        run.wait_for_members(1)
        run.pace(0.0, rank=1)
        assert run.finish() == 0, run.output()
    finally:
        run.process.kill()
    (node,) = {event["node"] for event in run.events("machine_error")}
    assert f"node {node}: memory errors that were corrected (mc0, 2 times)" in run.output()
    serious = [event for event in run.events("machine_error") if event["serious"]]
    assert [event["kind"] for event in serious] == ["memory_uncorrectable"]
    assert serious[0]["node"].endswith("-0")
    assert [event["rank"] for event in run.events("rank_left")] == [0]
    assert not run.events("rank_lost")
    assert (
        "leaves, as its machine reports: a memory error that cannot be corrected (mc0)"
        in run.output()
    )
    expected = bits_of(run_training(cluster, make_config(train=TRAIN, model=MODEL)))
    assert run.bits() == expected


def test_a_node_that_is_alone_in_a_run_goes_on(tmp_path: Path) -> None:
    tree = MachineTree(tmp_path / "machine")
    tree.count(UNCORRECTABLE, 1)
    run = run_with_tree(tmp_path, tree, nodes=1)
    try:
        run.wait_for_step(2)
        tree.count(UNCORRECTABLE, 2)
        run.wait_until(lambda: "goes on, as no other node trains" in run.output(), "it is told")
        run.pace(0.0, rank=1)
        assert run.finish() == 0, run.output()
    finally:
        run.process.kill()
    assert [event["serious"] for event in run.events("machine_error")] == [True]
    assert not run.events("rank_left")
