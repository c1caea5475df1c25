"""Slow ranks compute less, by claims in a step or shares between steps, and change no bit."""

from __future__ import annotations

import gzip
import json
from typing import Any

import pytest

from support.runs.elastic_runs import ElasticRun, Starter, Undisturbed, fault

pytestmark = [pytest.mark.mp]

TRAIN = {"steps": 5, "global_batch": 12}
SHALLOW = {"layers": 2}
LAST = 5
RELIEVED = {"slow_ranks": "relieve", "straggler_every": 1, "respawn": False}
CLAIMED = {"claims": True, "respawn": False}


def slowly(ranks: int, slow: int, until: int = 0) -> list[dict[str, Any]]:
    """All ranks take their time, as if they had devices of their own, and one of them much more.

    Args:
        until: the step in which it is well again; 0: it never is.
    """

    def lasting(rank: int, step: int, factor: float) -> dict[str, Any]:
        return fault("slow-compute", rank, step, seconds=600.0, factor=factor)

    found = [*(lasting(rank, 1, 8.0) for rank in range(ranks)), lasting(slow, 2, 60.0)]
    return [*found, lasting(slow, until, 1.0), lasting(slow, until, 8.0)] if until else found


def computed(run: ElasticRun, step: int) -> dict[int, set[int]]:
    """By rank, the micro-batches that it computed in a step whose trace is written."""
    found = {}
    for path in (run.root / "trace").glob(f"step-{step:08d}.rank-*.json.gz"):
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
        rank = int(path.name.split("rank-")[1].split(".")[0])
        arguments = [event.get("args", {}) for event in events]
        found[rank] = {seen["micro_batch"] for seen in arguments if "micro_batch" in seen}
    return found


def test_a_slow_rank_claims_less_and_changes_no_bit(
    start: Starter, undisturbed: Undisturbed
) -> None:
    sections = {"train": TRAIN, "model": SHALLOW, "numerics": {"tensor_shards": 2}}
    run = start(
        **sections,
        parallel={"data": 3, "tensor": 2},
        elastic={**CLAIMED, "chaos": slowly(6, slow=0)},
        log={"trace_steps": [LAST]},
    )
    assert run.finish() == 0, run.output()
    assert run.bits() == undisturbed(**sections)
    found = computed(run, LAST)
    by_group = [found[0], found[2], found[4]]
    assert sorted(n for own in by_group for n in own) == list(range(TRAIN["global_batch"]))
    assert len(by_group[0]) < min(map(len, by_group[1:]))
    assert [found[1], found[3], found[5]] == by_group, "ranks of a tensor group differ"


def test_a_rank_is_lost_while_ranks_claim(start: Starter, undisturbed: Undisturbed) -> None:
    sections = {"train": TRAIN, "model": SHALLOW}
    faults = [fault("kill", 1, 2, "backward"), fault("kill", 0, 4, "exchange")]
    run = start(**sections, parallel={"data": 4}, elastic={**CLAIMED, "chaos": faults})
    assert run.finish() == 0, run.output()
    assert run.bits() == undisturbed(**sections)
    recovered = run.events("recovered")
    assert [event["lost"] for event in recovered] == [[1], [0]]
    kept = [TRAIN["global_batch"] - e["recomputed_micro_batches"] for e in recovered]
    assert kept[0] > 0, "what the others had computed of the step counts"


def test_micro_batches_are_divided_by_speed_and_evenly_again(
    start: Starter, undisturbed: Undisturbed
) -> None:
    sections = {"train": {"steps": 30, "global_batch": 12}, "model": SHALLOW}
    elastic = {**RELIEVED, "chaos": slowly(4, slow=1, until=12)}
    run = start(**sections, parallel={"data": 4}, elastic=elastic)
    assert run.finish() == 0, run.output()
    assert run.bits() == undisturbed(**sections)
    first, *others = told = relief_of(run, 1)
    assert first["micro_batches"]["1"] < 3, told
    assert others, "the rank is well again, and nothing followed"
    assert others[-1]["micro_batches"]["1"] > first["micro_batches"]["1"]
    assert not run.events("rank_lost")
    again = start.replay(run)
    assert again.finish() == 0, again.output()  # it compares the plans of all changes
    assert again.bits() == run.bits()
    assert [e["micro_batches"] for e in relief_of(again, 1)] == [e["micro_batches"] for e in told]


def relief_of(run: ElasticRun, rank: int) -> list[dict[str, Any]]:
    """The divisions by speed from the first one on that names a rank."""
    found = run.events("relieved")
    first = next((n for n, e in enumerate(found) if str(rank) in e["slowness"]), len(found))
    return found[first:]


def test_a_slow_rank_of_a_stage_leaves_micro_batches_to_another_pipeline(
    start: Starter, undisturbed: Undisturbed
) -> None:
    sections = {"train": {"steps": 12, "global_batch": 12}, "model": SHALLOW}
    elastic = {**RELIEVED, "chaos": slowly(4, slow=1)}
    run = start(**sections, parallel={"data": 2, "pipeline": 2}, elastic=elastic)
    assert run.finish() == 0, run.output()
    assert run.bits() == undisturbed(**sections)
    counts = relief_of(run, 1)[0]["micro_batches"]
    assert counts["1"] < counts["0"], "ranks 0 and 1 have the first stage"
    assert counts["2"] == counts["3"] == 6
