"""Plans as JSON values, for joining ranks and for programs beside the run. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from holdfast.parallel.layout import StageReplicas
from holdfast.parallel.plan.initial import split_micro_batches
from holdfast.parallel.plan.plan import Plan
from holdfast.parallel.plan.replan import assign_micro_batches


def plan_to_data(plan: Plan) -> dict[str, Any]:
    """The values by which a plan differs from the first plan of its configuration."""
    return {
        "generation": plan.generation,
        "stages": plan.stage_replicas.stages,
        "spares": plan.stage_replicas.spares,
        "placement": plan.placement,
        "chunk_layers": plan.chunk_layers,
        "owners": [_runs(owners) for owners in plan.owners],
        "shadows": [_runs(shadows) for shadows in plan.shadows],
        "arriving": [_runs(ranks) for ranks in plan.incoming],
    }


def plan_from_data(first: Plan, data: Mapping[str, Any]) -> Plan:
    """The plan of values that `plan_to_data` made.

    Args:
        first: the first plan of the same configuration.
    """
    stage_replicas = StageReplicas(
        tuple(tuple(tuple(replica) for replica in stage) for stage in data["stages"]),
        tuple(data["spares"]),
    )
    rows = split_micro_batches(
        sum(map(len, first.micro_batches)), stage_replicas.widest, first.micro_batch_order
    )
    return first.evolved(
        generation=data["generation"],
        stage_replicas=stage_replicas,
        placement=tuple(data["placement"]),
        chunk_layers=tuple((a, b) for a, b in data["chunk_layers"]),
        micro_batches=rows,
        assignment=assign_micro_batches(stage_replicas, rows),
        given_owners=tuple(tuple(_repeated(runs)) for runs in data["owners"]),
        shadows=_followers(data["shadows"]),
        incoming=_followers(data["arriving"]),
    )


def _followers(data: Sequence[Sequence[Sequence[Any]]]) -> tuple[tuple[tuple[int, ...], ...], ...]:
    return tuple(tuple(tuple(ranks) for ranks in _repeated(runs)) for runs in data)


def _runs(values: Sequence[Any]) -> list[list[Any]]:
    return [[value, len(list(same))] for value, same in groupby(values)]


def _repeated(runs: Sequence[Sequence[Any]]) -> list[Any]:
    return [value for value, count in runs for _ in range(count)]
