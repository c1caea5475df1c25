"""`Plan.evolved` gives what a plan built anew would give, whatever was worked out before."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from holdfast.parallel.layout import StageReplicas
from holdfast.parallel.plan import (
    KeptKind,
    Plan,
    all_keepers,
    evaluation_program,
    shard_group,
    training_program,
)
from holdfast.parallel.plan.plan import DERIVED_FROM
from holdfast.parallel.plan.replan import Roster, replan
from support.runs.plans import NODES, first_plan

EXPERTS: dict[str, Any] = {"count": 4, "experts": 4, "expert_ranks": 3}
_SCHEDULES = st.sampled_from(
    [("1f1b", 1), ("gpipe", 1), ("zb-h1", 1), ("interleaved-1f1b", 2), ("zb-v", 2)]
)


def anew(plan: Plan) -> Plan:
    """The same fields in a plan that knows nothing yet."""
    return Plan(**{f.name: getattr(plan, f.name) for f in fields(plan) if f.init})


def derived(plan: Plan) -> dict[str, Any]:
    """Everything that can be asked of a plan; asking fills what it keeps."""
    ranks, blocks = plan.stage_replicas.ranks, [b for found in plan.blocks for b in found]
    kinds: tuple[KeptKind, ...] = ("gradients", "parameters")
    shared = plan.evolved(shard="parameters", shard_group=2)
    return {
        "blocks": plan.blocks,
        "owners": plan.owners,
        "owned": [plan.owned_blocks(rank) for rank in ranks],
        "holders": [(plan.holders(block), plan.contributors(block)) for block in blocks],
        "contribute": plan.all_holders_contribute,
        "segments": [
            plan.blocks_of(layer, part, row)
            for layer, spec in enumerate(plan.layers)
            for part, rows in enumerate(spec.parameters)
            for row in range(len(rows))
        ],
        "groups": [[shard_group(p, r, k) for r in ranks] for p in (plan, shared) for k in kinds],
        "keepers": [
            [all_keepers(p, block, k) for block in blocks] for p in (plan, shared) for k in kinds
        ],
        "training": [training_program(plan, rank) for rank in ranks],
        "some": [training_program(plan, rank, frozenset({1, 4})) for rank in ranks],
        "evaluation": [evaluation_program(plan, rank) for rank in ranks],
        "experts": [
            [plan.experts_of(rank, layer) for rank in ranks]
            for layer in range(len(plan.layers))
            if plan.spreads_experts
        ],
        "teams": [plan.team_of_rank(rank) for rank in ranks],
    }


def changes_of(plan: Plan, rng: random.Random) -> Mapping[str, Any]:
    """Some fields of another sound plan of the same run, or single fields that may change alone."""
    replicas = plan.stage_replicas
    kind = rng.randrange(9)
    if kind == 0:
        return {"generation": plan.generation + 1, "given_owners": plan.owners}
    if kind == 1:
        return {"stage_replicas": StageReplicas(replicas.stages, (*replicas.spares, 39))}
    if kind == 2:
        return {"block_elements": rng.choice([500, 2000]), "given_owners": None, "shadows": ()}
    if kind == 3:
        return {"activation_headroom": rng.choice([0.0, 0.3, 2.0])}
    if kind == 4:
        cheaper = (replace(layer, activation_bytes=1 + rng.randrange(9)) for layer in plan.layers)
        return {"layers": tuple(cheaper)}
    if kind == 5 and plan.is_regular:
        return {"micro_batches": tuple(tuple(reversed(row)) for row in plan.micro_batches)}
    if kind == 6:
        return {
            "given_owners": tuple(
                tuple(rng.choice(plan.candidates((block.key,))) for block in blocks)
                for blocks in plan.blocks
            )
        }
    if kind == 7:
        return {"shard": rng.choice(["optimizer", "gradients", "parameters"]), "shard_group": 3}
    present = [r for r in range(12) if rng.random() < 0.7]
    other = replan(plan, Roster(tuple(present or [0]), NODES), generation=plan.generation + 1)
    return {f.name: getattr(other, f.name) for f in fields(other) if f.init}


@settings(max_examples=60)
@given(_SCHEDULES, st.integers(0, 2**32), st.integers(1, 5))
def test_an_evolved_plan_is_the_plan_built_anew(
    schedule: tuple[str, int], seed: int, changes: int
) -> None:
    rng = random.Random(seed)
    experts = rng.choice([{}, EXPERTS])
    plan = anew(first_plan(*schedule, data=3, pipeline=2, **experts))
    for _ in range(changes):
        if rng.random() < 0.7:
            derived(plan)
        plan = plan.evolved(**changes_of(plan, rng))
        assert derived(plan) == derived(anew(plan))


def test_the_table_names_every_derived_value_and_fields_that_exist() -> None:
    plan = anew(first_plan(data=3, pipeline=2))
    uneven = replan(plan, Roster((0, 1, 2, 3, 4), NODES), generation=1)
    many = uneven.evolved(micro_batches=plan.micro_batches)
    spread = anew(first_plan(data=3, pipeline=2, **EXPERTS))
    plans = (plan, many, plan.evolved(shard="parameters", shard_group=2), spread)
    asked = {name for p in plans if derived(p) for name, known in p._derived.items() if known}
    # Only plans too large for the list scheduler take these two for training; evaluation always
    # does.
    assert asked == set(DERIVED_FROM)
    assert set().union(*DERIVED_FROM.values()) <= {f.name for f in fields(Plan) if f.init}


def test_what_is_read_for_a_derived_value_is_what_the_table_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A field too few would keep a wrong value, a field too many would drop a right one."""
    names = {f.name for f in fields(Plan) if f.init}
    read: dict[str, set[str]] = {name: set() for name in DERIVED_FROM}
    asked: dict[str, set[str]] = {name: set() for name in DERIVED_FROM}
    under_way: list[str] = []
    derive = Plan.derived

    def get(plan: Plan, name: str) -> Any:
        if under_way and name in names:
            read[under_way[-1]].add(name)
        return object.__getattribute__(plan, name)

    def recorded(plan: Plan, name: str, key: Any, make: Callable[[], Any]) -> Any:
        def watched() -> Any:
            under_way.append(name)
            try:
                return make()
            finally:
                under_way.pop()

        if under_way:
            asked[under_way[-1]].add(name)
        return derive(plan, name, key, watched)

    monkeypatch.setattr(Plan, "__getattribute__", get)
    monkeypatch.setattr(Plan, "derived", recorded)
    first = first_plan("interleaved-1f1b", 2, data=3, pipeline=2)
    spread = first_plan("interleaved-1f1b", 2, data=3, pipeline=2, **EXPERTS)
    for plan in (first, spread):
        derived(anew(plan))
        derived(anew(replan(plan, Roster((0, 1, 2, 3, 4), NODES), generation=1)))
    monkeypatch.undo()
    for _ in DERIVED_FROM:
        for name, others in asked.items():
            read[name].update(*(read[other] for other in others))
    assert read == {name: set(found) for name, found in DERIVED_FROM.items()}


def test_what_no_change_touches_is_worked_out_once() -> None:
    plan = anew(first_plan(data=2, pipeline=2))
    following = plan.evolved(generation=1, given_owners=plan.owners, incoming=())
    assert following.owned_blocks(0) is plan.owned_blocks(0)
    assert following.blocks is plan.blocks
    assert plan.evolved(block_elements=500).blocks is not plan.blocks


def test_an_ordinary_copy_knows_nothing() -> None:
    plan = anew(first_plan(data=2, pipeline=2))
    derived(plan)
    assert not any(replace(plan, generation=1)._derived.values())
