"""Norms by layer: of each chosen step, with the same bits in any layout and through losses."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from holdfast.trainer.elastic.worker_status import (
    WorkerStatus,
    status_from_data,
    status_to_data,
)
from holdfast.trainer.step.ballot import layer_norms
from holdfast.trainer.step.progress import Outcome
from holdfast.trainer.terms.terms import config_terms
from support.processes.cluster import Cluster
from support.runs.elastic_runs import Starter, fault
from support.runs.small_runs import make_config, metrics_of, run_training

MODEL = {"layers": 2}
TRAIN = {"steps": 6, "global_batch": 4}
NAMES = ["embedding", "block.0", "block.1", "head"]


def test_each_layer_has_the_norm_of_its_own_blocks() -> None:
    assert layer_norms([9.0, 1.0, 16.0, 4.0], [1.0, 4.0, 0.0, 0.0], [0, 1, 0, 1]) == (
        (5.0, 1.0),
        (math.sqrt(5.0), 2.0),
    )
    assert layer_norms([9.0, 1.0], [], []) == ()


def test_the_key_changes_the_vote_so_ranks_compare_it() -> None:
    first, other = (config_terms(make_config(log={"norms_every": n}), {}) for n in (0, 2))
    assert {name for name in first if first[name] != other[name]} == {"log.norms_every"}
    assert config_terms(make_config(log={"every": 7}), {}) == first


def test_an_outcome_with_norms_survives_the_way_through_a_message() -> None:
    outcome = Outcome(2.0, 1.0, 0, 0, layer_norms=((0.1, 1 / 3), (5e-324, 1e300)))
    status = WorkerStatus(outcome=outcome)
    plain = msgspec.json.decode(msgspec.json.encode(status_to_data(status)))
    assert status_from_data(plain).outcome == outcome


@pytest.mark.mp
@pytest.mark.parametrize(
    ("shards", "parallel"),
    [
        (1, {"data": 2, "shard": "parameters"}),
        (1, {"pipeline": 2, "virtual": 2, "schedule": "zb-v"}),
        (2, {"tensor": 2}),
    ],
    ids=str,
)
def test_layouts_give_the_norms_of_one_process(
    cluster: Cluster, shards: int, parallel: dict[str, Any]
) -> None:
    sections: dict[str, Any] = {
        "model": {"layers": 4},
        "train": TRAIN,
        "log": {"norms_every": 2},
        "numerics": {"tensor_shards": shards},
    }
    found = [
        run_training(cluster, make_config(**sections, parallel=layout)) for layout in ({}, parallel)
    ]
    assert found[0] == found[1]
    assert [len(norms) for norms in found[0]["layer_norms"]] == [0, 6, 0, 6, 0, 6]
    for norms, whole in zip(found[0]["layer_norms"], found[0]["norms"], strict=True):
        if norms:
            assert math.hypot(*(g for g, _ in norms)) == pytest.approx(float.fromhex(whole))


@pytest.mark.mp
def test_a_step_that_a_loss_interrupts_has_the_same_norms_in_the_records(
    cluster: Cluster, start: Starter, tmp_path: Path
) -> None:
    root = tmp_path / "alone"
    config = make_config(model=MODEL, train=TRAIN, log={"norms_every": 2, "tensorboard": True})
    plain = msgspec.to_builtins(config)
    cluster.run("support.runs.small_runs:train_in", 1, config=plain, root=str(root))
    alone = {line["step"]: line for line in metrics_of(root)}
    assert [step for step, line in alone.items() if "grad_norms" in line] == [2, 4, 6]
    assert list(alone[4]["grad_norms"]) == list(alone[4]["param_norms"]) == NAMES
    run = start(
        model=MODEL,
        train=TRAIN,
        log={"norms_every": 2},
        parallel={"data": 2},
        elastic={"chaos": [fault("kill", 0, 4, "apply")]},
    )
    assert run.finish() == 0, run.output()
    assert len(run.events("rank_lost")) == 1
    for line in run.steps():
        for key in ("grad_norms", "param_norms"):
            assert line.get(key) == alone[line["step"]].get(key)
    board = EventAccumulator(str(root / "tensorboard"))
    board.Reload()
    shown_norms = {scalar.step: scalar.value for scalar in board.Scalars("param_norm/block.1")}
    expected = {step: alone[step]["param_norms"]["block.1"] for step in (2, 4, 6)}
    assert shown_norms == pytest.approx(expected, rel=1e-6)
