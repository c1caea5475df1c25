"""Stage replicas that lose ranks go on with smaller tensor and context degrees; no bit changes."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from holdfast.checkpoint.tools.diff import diff_checkpoints
from support.processes.cluster import Cluster
from support.runs.elastic_runs import ElasticRun, Starter, bits_of, fault, pace
from support.runs.small_runs import events_of, make_config, run_in, run_training

pytestmark = [pytest.mark.mp, pytest.mark.chaos, pytest.mark.slow, pytest.mark.timeout(300)]

TRAIN = {"steps": 5, "global_batch": 3, "seq_len": 32}
NUMERICS = {"tensor_shards": 4}
MODEL = {"layers": 4, "kv_heads": 2}
SECTIONS: dict[str, Any] = {"train": TRAIN, "model": MODEL, "numerics": NUMERICS}
SHALLOW: dict[str, Any] = {**SECTIONS, "model": {**MODEL, "layers": 2}}
"""For runs without chunks of layers."""
PACE_S = 0.2
LONG_S = 2.0
"""How long a step takes until all ranks take part again."""


def expected_of(cluster: Cluster, sections: dict[str, Any]) -> dict[str, Any]:
    return bits_of(run_training(cluster, make_config(**sections)))


def stages_of(run: ElasticRun) -> list[list[list[list[int]]]]:
    """The stage replicas of a run, one after another."""
    stages = [event["plan"]["stages"] for event in run.events() if "plan" in event]
    return [found for found, _ in groupby(stages)]


def test_one_replica_loses_rank_after_rank(start: Starter, cluster: Cluster) -> None:
    """Matrices that have one owner, whichever ranks hold their parts, change owners."""
    sections: dict[str, Any] = {**SHALLOW, "optimizer": {"name": "muon"}}
    kills = [(1, 2, "backward"), (3, 3, "reduce"), (0, 5, "gather")]
    run = start(
        **sections,
        parallel={"tensor": 4},
        elastic={
            "respawn": False,
            "min_ranks": 1,
            "local_nodes": 4,
            "chaos": [fault("kill", rank, step, phase) for rank, step, phase in kills],
        },
    )
    assert run.finish() == 0, run.output()
    assert run.bits() == expected_of(cluster, sections)
    assert stages_of(run)[1:] == [[[[0, 2], [3]]], [[[0, 2]]], [[[2]]]]
    assert all(event["from_checkpoint"] is None for event in run.events("recovered"))


def test_stages_of_different_degrees_send_each_other_tokens(
    start: Starter, cluster: Cluster
) -> None:
    """Layers stay with two chunks a rank; lost ranks come back, and replicas are whole again."""
    sections: dict[str, Any] = {**SECTIONS, "train": {**TRAIN, "steps": 8, "global_batch": 4}}
    run = start(
        **sections,
        parallel={
            "tensor": 2,
            "pipeline": 2,
            "virtual": 2,
            "schedule": "interleaved-1f1b",
            "data": 2,
        },
        elastic=pace({"chaos": [fault("kill", 1, 2), fault("kill", 6, 3, "backward")]}, LONG_S),
    )

    def are_whole_again() -> bool:
        stages = stages_of(run)
        return len(run.events("rank_lost")) == 2 and stages[-1] == stages[0]

    run.wait_until(are_whole_again, "both ranks are replaced")
    run.pace(0.0)
    assert run.finish() == 0, run.output()
    assert run.bits() == expected_of(cluster, sections)
    stages = stages_of(run)
    assert [[[0], [2, 3]], [[4, 5], [6, 7]]] in stages
    assert any([len(held) for held in after[1]] != [2, 2] for after in stages)
    assert stages[-1] == stages[0]


@pytest.mark.parametrize(("shards", "exchange"), [(2, "heads"), (4, "keys")])
def test_a_context_group_loses_a_rank(
    start: Starter, cluster: Cluster, shards: int, exchange: str
) -> None:
    sections: dict[str, Any] = {
        **SHALLOW,
        "numerics": {"tensor_shards": shards},
        "train": {**TRAIN, "steps": 4, "global_batch": 4, "context_chunks": 2, "precision": "bf16"},
        "data": {"packing": "documents"},
    }
    run = start(
        **sections,
        parallel={"tensor": 2, "context": 2, "pipeline": 2, "context_exchange": exchange},
        elastic={
            "respawn": False,
            "chaos": [fault("kill", 2, 2, "backward"), fault("kill", 5, 4, "vote")],
        },
    )
    assert run.finish() == 0, run.output()
    assert run.bits() == expected_of(cluster, sections)
    first, after_one, after_two = stages_of(run)
    assert first == [[[0, 1, 2, 3]], [[4, 5, 6, 7]]]
    assert after_one == [[[0, 1], [3]], [[4, 5, 6, 7]]]
    assert after_two == [[[0, 1], [3]], [[4, 7], [6]]]


def test_smaller_replicas_evaluate_and_save_what_one_process_does(
    start: Starter, cluster: Cluster, tmp_path: Path
) -> None:
    """Columns of a matrix lie with ranks of different replicas then."""
    sections: dict[str, Any] = {
        **SHALLOW,
        "train": {**TRAIN, "steps": 6, "eval_every": 2, "eval_batches": 1},
        "checkpoint": {"every": 2, "keep": 0},
    }
    alone = tmp_path / "alone"
    run_in(cluster, make_config(**sections), alone)
    run = start(
        **sections,
        parallel={"tensor": 4},
        elastic=pace({"respawn": False, "chaos": [fault("kill", 1, 3, "backward")]}, PACE_S),
    )
    assert run.finish() == 0, run.output()
    assert stages_of(run)[-1] == [[[0, 2], [3]]]
    assert run.bits() == expected_of(cluster, sections)
    held_out = [
        [(event["step"], event["loss_hex"]) for event in events_of(root, "evaluated")]
        for root in (alone, run.root)
    ]
    assert held_out[0] == held_out[1]
    assert [step for step, _ in held_out[0]] == [2, 4, 6]
    for name in ("step-00000004", "step-00000006"):
        difference = diff_checkpoints(alone / "checkpoints" / name, run.root / "checkpoints" / name)
        assert difference.equal, difference.as_dict()
