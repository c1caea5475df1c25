"""Norms by layer: of each chosen step, with the same bits in any layout and through losses."""

from __future__ import annotations

import math
import random
from fractions import Fraction
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given, strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from holdfast.parallel.pipeline import TokensKey
from holdfast.trainer.elastic.worker_status import (
    WorkerStatus,
    status_from_data,
    status_to_data,
)
from holdfast.trainer.step.vote.ballot import layer_norms
from holdfast.trainer.step.vote.notes import Outputs, TokensOutput, output_of, packed, sizes
from holdfast.trainer.step.vote.progress import Outcome
from holdfast.trainer.terms.terms import config_terms
from support.processes.cluster import Cluster
from support.runs.elastic_runs import Starter, fault
from support.runs.small_runs import make_config, metrics_of, run_training

MODEL = {"layers": 2}
TRAIN = {"steps": 6, "global_batch": 4}
NAMES = ["embedding", "block.0", "block.1", "head"]
NOTED = ("grad_norms", "param_norms", "output_rms", "output_max")


def noted_alone(cluster: Cluster, root: Path, **sections: Any) -> dict[int, dict[str, Any]]:
    """By step, the line of one process."""
    plain = msgspec.to_builtins(make_config(**sections))
    cluster.run("support.runs.small_runs:train_in", 1, config=plain, root=str(root))
    return {line["step"]: line for line in metrics_of(root)}


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
    norms, outputs = ((0.1, 1 / 3), (5e-324, 1e300)), ((0.1, 2.5), None)
    outcome = Outcome(2.0, 1.0, 0, 0, layer_norms=norms, layer_outputs=outputs)
    status = WorkerStatus(outcome=outcome)
    plain = msgspec.json.decode(msgspec.json.encode(status_to_data(status)))
    assert status_from_data(plain).outcome == outcome


@pytest.mark.mp
@pytest.mark.parametrize(
    ("shards", "slices", "parallel"),
    [
        (1, 1, {"data": 2, "shard": "parameters"}),
        (1, 1, {"pipeline": 2, "virtual": 2, "schedule": "zb-v"}),
        (2, 2, {"tensor": 2, "pipeline": 2, "stretches": 2}),
        (2, 2, {"context": 2}),
    ],
    ids=str,
)
def test_layouts_give_the_norms_and_outputs_of_one_process(
    cluster: Cluster, shards: int, slices: int, parallel: dict[str, Any]
) -> None:
    """Layers are computed again in the backward pass of the layout alone."""
    sections: dict[str, Any] = {
        "model": {"layers": 4},
        "log": {"norms_every": 2},
        "numerics": {"tensor_shards": shards},
    }
    train = {**TRAIN, "context_chunks": slices}
    found = [
        run_training(cluster, make_config(**sections, parallel=layout, train=train | again))
        for layout, again in (({}, {}), (parallel, {"recompute": "full"}))
    ]
    assert found[0] == found[1]
    assert [len(norms) for norms in found[0]["layer_norms"]] == [0, 6, 0, 6, 0, 6]
    assert [len(outputs) for outputs in found[0]["layer_outputs"]] == [0, 5, 0, 5, 0, 5]
    for norms, whole in zip(found[0]["layer_norms"], found[0]["norms"], strict=True):
        if norms:
            assert math.hypot(*(g for g, _ in norms)) == pytest.approx(float.fromhex(whole))


@pytest.mark.mp
def test_a_step_that_a_loss_interrupts_has_the_same_norms_in_the_records(
    cluster: Cluster, start: Starter, tmp_path: Path
) -> None:
    root = tmp_path / "alone"
    log = {"norms_every": 2, "tensorboard": True}
    alone = noted_alone(cluster, root, model=MODEL, train=TRAIN, log=log)
    assert [step for step, line in alone.items() if "grad_norms" in line] == [2, 4, 6]
    assert list(alone[4]["grad_norms"]) == list(alone[4]["param_norms"]) == NAMES
    assert list(alone[4]["output_rms"]) == list(alone[4]["output_max"]) == NAMES[:-1]
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
        for key in NOTED:
            assert line.get(key) == alone[line["step"]].get(key)
    board = EventAccumulator(str(root / "tensorboard"))
    board.Reload()
    for tag, key in (("param_norm", "param_norms"), ("output_rms", "output_rms")):
        shown = {scalar.step: scalar.value for scalar in board.Scalars(f"{tag}/block.1")}
        expected = {step: alone[step][key]["block.1"] for step in (2, 4, 6)}
        assert shown == pytest.approx(expected, rel=1e-6)


@pytest.mark.mp
@pytest.mark.chaos
def test_a_smaller_replica_notes_what_a_whole_one_does(
    cluster: Cluster, start: Starter, tmp_path: Path
) -> None:
    """Of the step that is interrupted, the rank that is left keeps what it has noted."""
    sections: dict[str, Any] = {
        "model": MODEL,
        "train": {**TRAIN, "steps": 4},
        "log": {"norms_every": 2},
        "numerics": {"tensor_shards": 2},
    }
    alone = noted_alone(cluster, tmp_path / "alone", **sections)
    run = start(
        **sections,
        parallel={"tensor": 2},
        elastic={
            "respawn": False,
            "min_ranks": 1,
            "local_nodes": 2,
            "chaos": [fault("kill", 1, 2, "backward")],
        },
    )
    assert run.finish() == 0, run.output()
    assert len(run.events("rank_lost")) == 1
    for line in run.steps():
        for key in NOTED:
            assert line.get(key) == alone[line["step"]].get(key)


VALUES = st.floats(0, 1e150, allow_subnormal=True)


@given(
    st.lists(st.tuples(st.integers(0, 1), st.integers(0, 3), VALUES, VALUES), max_size=30),
    st.randoms(use_true_random=False),
)
def test_squares_are_added_exactly_whichever_ranks_have_them(
    noted: list[tuple[int, int, float, float]], rng: random.Random
) -> None:
    ranks: list[Outputs] = [{} for _ in range(3)]
    for number, (layer, part, root, largest) in enumerate(noted):
        output = TokensOutput(root * root, largest, 8)
        rng.choice(ranks)[TokensKey(layer, part, number, 0)] = output
    summed = sum(packed(own, 2, place, 3) for place, own in enumerate(ranks))
    assert isinstance(summed, Tensor)
    for layer, found in enumerate(sizes(summed)):
        here = [(root * root, largest) for k, _, root, largest in noted if k == layer]
        if not here:
            assert found is None
            continue
        mean = sum(Fraction(squares) for squares, _ in here) / (8 * len(here))
        assert found == (math.sqrt(mean), max(largest for _, largest in here))


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_an_output_that_is_not_finite_has_no_size(wrong: float, dtype: torch.dtype) -> None:
    hidden = torch.tensor([[1.0, -3.0], [2.0, 0.0]], dtype=dtype)
    key = TokensKey(0, 0, 0, 0)
    assert output_of(hidden) == TokensOutput(14.0, 3.0, 4)
    hidden[1, 1] = wrong
    assert sizes(packed({key: output_of(hidden)}, 1, 0, 1)) == (None,)
