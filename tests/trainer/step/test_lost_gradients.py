"""Which gradients of experts are computed again, and by which ranks; nothing is left out."""

from __future__ import annotations

import random
from typing import Any

import pytest

from holdfast.parallel.layout import SharePlace, contributing_parts
from holdfast.parallel.plan import Plan, Roster, replan
from holdfast.trainer.step.micro_batches.partial_sums import (
    Included,
    InterruptedStep,
    RankInputs,
    included_after_change,
    inputs_after_change,
    keeps_sums,
)
from holdfast.trainer.step.planning import plan_of
from support.runs.small_runs import make_config

MICRO_BATCHES, SLICES = 8, 2
UNITS = MICRO_BATCHES * SLICES


def layout(**parallel: Any) -> Plan:
    config = make_config(
        model={"family": "mixtral", "layers": 2, "experts": 8, "experts_per_token": 2},
        train={"global_batch": MICRO_BATCHES, "context_chunks": SLICES},
        numerics={"tensor_shards": 2},
        parallel=parallel,
        elastic={"enabled": True},
    )
    return plan_of(config)


def rows_of(plan: Plan, rank: int) -> set[tuple[int, int, int]]:
    return {
        (part, row.layer, row.index)
        for layer in plan.layers_at(rank)
        for row in plan.rows_of(rank, layer)
        for part in contributing_parts(row, plan.parts_of(rank))
    }


def units_of(plan: Plan, rank: int) -> set[int]:
    """The units whose tokens a rank has, without a context group."""
    at = plan.stage_replicas.coordinates(rank)
    numbers = plan.micro_batches_of(at.pipeline, at.data)
    return {number * SLICES + slice_ for number in numbers for slice_ in range(SLICES)}


def after_all_is_done(plan: Plan, rank: int, draw: random.Random) -> tuple[Included, RankInputs]:
    """What a rank's sums include after a whole step, and what it has kept of some units."""
    team = plan.team_of_rank(rank)
    of_team = set[int]().union(*(units_of(plan, member) for member in team))
    experts = {key for key in rows_of(plan, rank) if _expert(plan, key) is not None}
    included = {
        key: frozenset(
            _by_host(plan, key, rank, of_team) if key in experts else units_of(plan, rank)
        )
        for key in rows_of(plan, rank)
    }
    at = plan.stage_replicas.coordinates(rank)
    shares = len(plan.stage_replicas.stages[at.pipeline][at.data])
    kept = [unit for unit in units_of(plan, rank) if draw.random() < 0.8]
    return included, {SharePlace(at.shard, shares): kept}


def _expert(plan: Plan, key: tuple[int, int, int]) -> int | None:
    part, layer, row = key
    return plan.layers[layer].parameters[part][row].expert


def _by_host(plan: Plan, key: tuple[int, int, int], rank: int, units: set[int]) -> set[int]:
    """Of a team's units, those of which a rank has the gradient: hosts take them in turn."""
    expert, team = _expert(plan, key), plan.team_of_rank(rank)
    assert expert is not None
    hosts = [host for host in plan.hosts(key[1])[expert] if host in team]
    return {unit for unit in units if hosts[unit % len(hosts)] == rank}


@pytest.mark.parametrize(
    "parallel",
    [
        {"data": 4, "expert": 4},
        {"data": 4, "expert": 2},
        {"data": 2, "tensor": 2, "expert": 4},
        {"data": 4, "pipeline": 2, "expert": 2},
        {"data": 4, "expert": 4, "expert_replicas": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("seed", range(8))
def test_each_gradient_is_there_or_computed_once(parallel: dict[str, Any], seed: int) -> None:
    """After losses at the end of a step, and again after losses when it was nearly repeated."""
    draw = random.Random(seed)
    before = layout(**parallel)
    ranks = before.stage_replicas.ranks
    found = {rank: after_all_is_done(before, rank, draw) for rank in ranks}
    lost = draw.sample(ranks, draw.choice((1, 2)))
    left = tuple(rank for rank in ranks if rank not in lost)
    if not all(
        set(left).intersection(rank for replica in stage for rank in replica)
        for stage in before.stage_replicas.stages
    ):
        pytest.skip("all ranks of a stage were drawn, which loads a checkpoint")
    roster = Roster(left, {rank: str(rank) for rank in left}, frozenset())
    after = replan(before, roster, generation=1, move_layers=False)
    included = included_after_change(
        before, after, {rank: found[rank][0] for rank in left}, frozenset()
    )
    inputs = inputs_after_change(
        before, after, {rank: found[rank][1] for rank in left}, frozenset()
    )
    step = InterruptedStep(3, included, SLICES, inputs)
    missing = step.missing(after, MICRO_BATCHES)
    not_kept = {
        unit // SLICES
        for rank in ranks
        for kept in found[rank][1].values()
        for unit in units_of(before, rank) - set(kept)
    }
    kept = [rank for rank in left if keeps_sums(before, after, rank, frozenset())]
    of_others = {
        unit // SLICES for rank in set(ranks).difference(kept) for unit in units_of(before, rank)
    }
    assert missing <= of_others | not_kept
    for stage, of_stage in enumerate(after.stage_replicas.stages):
        teams = [after.team_ranks(stage)[number] for number in range(len(after.teams(stage)))]
        of_teams = [
            [(piece, team) for piece in step.lost_gradients(after, team[0], missing)]
            for team in teams
        ]
        for team, pieces in zip(teams, of_teams, strict=True):
            for rank in team:
                alike = step.lost_gradients(after, rank, missing)
                assert alike == [piece for piece, _ in pieces]
        computed = [
            (piece.layer, piece.expert, piece.key[0] * SLICES + piece.key[1])
            for pieces in of_teams
            for piece, _ in pieces
        ]
        assert len(set(computed)) == len(computed)
        for pieces in of_teams:
            for piece, team in pieces:
                unit = piece.key[0] * SLICES + piece.key[1]
                assert team[piece.host] in after.hosts(piece.layer)[piece.expert]
                for place, source in enumerate(piece.sources):
                    [(share, kept)] = found[team[source]][1].items()
                    assert share == (place, len(piece.sources))
                    assert unit in kept
        ranks_here = {rank for replica in of_stage for rank in replica}
        for layer in after.layers_at(min(ranks_here)):
            for part, rows in enumerate(after.layers[layer].parameters):
                for row, spec in enumerate(rows):
                    for unit in range(UNITS):
                        ways = (
                            unit in included.get((part, layer, row), ()),
                            (layer, spec.expert, unit) in computed,
                            unit // SLICES in missing,
                        )
                        assert any(ways)
                        assert sum(ways[1:]) <= 1, "a gradient would be computed twice"
