"""A joining rank gets its state beside the steps, with losses meanwhile, and no bit changes."""

from __future__ import annotations

from typing import Any

import pytest

from support.processes.cluster import Cluster
from support.runs.elastic_runs import ElasticRun, Starter, bits_of, fault, pace
from support.runs.small_runs import make_config, run_training

pytestmark = [pytest.mark.mp]

TRAIN = {"steps": 11, "global_batch": 4}
MODEL = {"layers": 2}
PACE_S = 0.5


@pytest.fixture(scope="module")
def expected(cluster: Cluster) -> dict[str, Any]:
    return bits_of(run_training(cluster, make_config(train=TRAIN, model=MODEL)))


def changes(run: ElasticRun) -> list[dict[str, Any]]:
    return [event for event in run.events() if "plan" in event]


def test_a_replacement_is_given_its_state_beside_the_steps_and_then_owns_it(
    start: Starter, expected: dict[str, Any]
) -> None:
    run = start(
        train=TRAIN,
        model=MODEL,
        parallel={"data": 3},
        checkpoint={"every": 4},
        elastic=pace({"verify_every": 1, "chaos": [fault("kill", 2, 2, "reduce")]}, PACE_S),
    )
    assert run.finish() == 0, run.output()
    assert run.bits() == expected
    *earlier, joined, placed = changes(run)
    first, before = earlier[0], earlier[-1]
    assert [joined["joined"], joined["waiting"], placed["placed"]] == [[2], [2], [2]]
    assert joined["plan"]["spares"] == [2]
    if not joined["lost"]:  # else the replacement was as fast as the others
        assert before["lost"] == [2]
        assert joined["plan"]["stages"] == before["plan"]["stages"]
        assert joined["plan"]["owners"] == before["plan"]["owners"]
        assert joined["moved_bytes"] == 0
    assert placed["moved_bytes"] == 0
    assert placed["plan"]["stages"] == first["plan"]["stages"]
    assert not placed["plan"]["arriving"]
    assert "rank 2 joins as a shadow" in run.output()
    assert "rank 2 takes its place" in run.output()
    assert not run.events("corruption")


@pytest.mark.parametrize(
    "victim",
    [fault("kill", 2, 1, "fill", incarnation=1), fault("kill", 0, 1, "fill")],
    ids=["newcomer", "owner"],
)
def test_whoever_dies_while_a_newcomer_is_given_its_state_changes_no_bit(
    start: Starter, expected: dict[str, Any], victim: dict[str, Any]
) -> None:
    faults = [fault("kill", 2, 2, "reduce"), victim]
    elastic = pace(pace({"local_nodes": 3, "chaos": faults}, PACE_S, rank=1), PACE_S)
    run = start(train=TRAIN, model=MODEL, parallel={"data": 3}, elastic=elastic)
    assert run.finish() == 0, run.output()
    assert run.bits() == expected
    caused = [e for e in run.events("fault_injected") if e["phase"] == "fill"]
    assert [e["rank"] for e in caused] == [victim["rank"]]
    given = next(n for n, e in enumerate(changes(run)) if e["waiting"])
    after = changes(run)[given + 1]
    assert after["lost"] == [victim["rank"]]
    assert not after["filled"]
    assert after["from_checkpoint"] is None
    assert any(e["placed"] for e in changes(run))
