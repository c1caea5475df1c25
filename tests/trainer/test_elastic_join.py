"""A rank that joins is given its state beside the steps, whoever dies meanwhile, and no bit changes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster import Cluster
from elastic_runs import ElasticRun, Starter, bits_of, fault, pace
from small_runs import make_config, run_training

pytestmark = [pytest.mark.mp]

STEPS = 40
PACE_S = 0.1


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Starter]:
    starter = Starter(tmp_path)
    yield starter
    starter.close()


@pytest.fixture(scope="module")
def expected(cluster: Cluster) -> dict[str, Any]:
    return bits_of(run_training(cluster, make_config(train={"steps": STEPS})))


def changes(run: ElasticRun) -> list[dict[str, Any]]:
    return [event for event in run.events() if "plan" in event]


def test_a_replacement_is_given_its_state_beside_the_steps_and_then_owns_it(
    start: Starter, expected: dict[str, Any]
) -> None:
    run = start(
        train={"steps": STEPS},
        parallel={"data": 3},
        checkpoint={"every": 4},
        elastic=pace({"verify_every": 1, "chaos": [fault("kill", 2, 3, "reduce")]}, PACE_S),
    )
    assert run.finish() == 0, run.output()
    assert run.bits() == expected
    first, lost, joined, placed = changes(run)
    assert [lost["lost"], joined["joined"], placed["placed"]] == [[2], [2], [2]]
    assert joined["plan"]["spares"] == [2]
    assert joined["plan"]["stages"] == lost["plan"]["stages"]
    assert joined["plan"]["owners"] == lost["plan"]["owners"]
    assert joined["waiting"] == [2]
    assert [joined["moved_bytes"], placed["moved_bytes"]] == [0, 0]
    assert placed["plan"]["stages"] == first["plan"]["stages"]
    assert not placed["plan"]["arriving"]
    assert "rank 2 joins as a shadow" in run.output()
    assert "rank 2 takes its place" in run.output()
    assert not run.events("corruption")
