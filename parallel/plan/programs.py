"""The program of a rank: the actions of a step, in order.

A regular plan takes the schedule's order for each replica's own pipeline. If stages differ in their
number of replicas, activations cross pipelines, and rerouting.py gives the order. Pure; needs no
torch.
"""

from __future__ import annotations

from collections.abc import Callable

from holdfast.parallel.layout import Coordinates
from holdfast.parallel.plan.plan import Plan
from holdfast.parallel.plan.rerouting import (
    SCHEDULED_PAIRS,
    merged_program,
    regular_timeline,
    scheduled_programs,
    stage_caps,
)
from holdfast.parallel.schedules import (
    Action,
    Program,
    compute_programs,
    forward_only,
    peak_in_flight,
    with_messages,
)

_Generator = Callable[[str, int, int, int], tuple[Program, ...]]
"""(schedule, pipeline, virtual, micro-batches) -> compute actions by pipeline index."""


def training_program(plan: Plan, rank: int, only: frozenset[int] | None = None) -> Program:
    """The program of a rank in a training step, with global micro-batch numbers and peers' ranks.

    Args:
        only: the micro-batches to compute; None: all.
    """
    return _program(plan, "train", rank, compute_programs, only)


def evaluation_program(plan: Plan, rank: int) -> Program:
    """The program of a rank that evaluates one global batch: forwards only."""
    return _program(plan, "forward", rank, forward_only)


def _program(
    plan: Plan,
    kind: str,
    rank: int,
    generate: _Generator,
    only: frozenset[int] | None = None,
) -> Program:
    at = plan.stage_replicas.find(rank)
    if at is None:
        return ()
    if plan.is_regular and only is None:
        numbers = plan.micro_batches[at.data]
        local = _regular_programs(plan, kind, generate, len(numbers))
        named = tuple(Action(a.op, a.chunk, numbers[a.micro_batch]) for a in local[at.pipeline])
    else:
        named = _rerouted(plan, kind, at, only, generate)
    replicas = _computing_replicas(plan)
    complete = with_messages(
        {rank: named},
        lambda chunk, micro_batch: plan.stage_replicas.rank(
            at.shard,
            replicas[plan.placement[chunk]][micro_batch],
            plan.placement[chunk],
        ),
        chunks=len(plan.placement),
    )
    return complete[rank]


def _regular_programs(
    plan: Plan, kind: str, generate: _Generator, micro_batches: int
) -> tuple[Program, ...]:
    """The programs of a replica with this many micro-batches from 0 on, by pipeline index."""
    return plan.derived(
        "regular programs",
        (kind, micro_batches),
        lambda: generate(plan.schedule, plan.stage_replicas.pipeline, plan.virtual, micro_batches),
    )


def _computing_replicas(plan: Plan) -> tuple[dict[int, int], ...]:
    """By stage, the replica that computes each micro-batch."""
    return plan.derived(
        "computing replicas",
        None,
        lambda: tuple(
            {
                number: replica
                for replica in range(plan.stage_replicas.replicas(stage))
                for number in plan.micro_batches_of(stage, replica)
            }
            for stage in range(plan.stage_replicas.pipeline)
        ),
    )


def _rerouted(
    plan: Plan,
    kind: str,
    at: Coordinates,
    only: frozenset[int] | None,
    generate: _Generator,
) -> Program:
    """The compute actions of a stage replica when activations cross pipelines."""
    by_replica = plan.micro_batches
    if only is not None:
        by_replica = tuple(tuple(m for m in row if m in only) for row in by_replica)
    pairs = len(plan.placement) * sum(map(len, by_replica))
    if kind == "train" and 0 < pairs <= SCHEDULED_PAIRS:
        programs = plan.derived("scheduled programs", only, lambda: _scheduled(plan, by_replica))
        return programs.get(at.pipeline * plan.stage_replicas.widest + at.data, ())
    places = plan.derived(
        "row places",
        None,
        lambda: {m: place for row in plan.micro_batches for place, m in enumerate(row)},
    )
    timeline = plan.derived(
        "regular timeline",
        kind,
        lambda: regular_timeline(
            generate(
                plan.schedule,
                plan.stage_replicas.pipeline,
                plan.virtual,
                max(map(len, plan.micro_batches)),
            )
        ),
    )
    mine = plan.micro_batches_of(at.pipeline, at.data)
    wanted = mine if only is None else tuple(m for m in mine if m in only)
    return merged_program(wanted, places, timeline, at.pipeline)


def _scheduled(plan: Plan, by_replica: tuple[tuple[int, ...], ...]) -> dict[int, Program]:
    """The list-scheduled compute actions of all stage replicas, by stage x widest + replica."""
    replicas, widest = _computing_replicas(plan), plan.stage_replicas.widest
    return scheduled_programs(
        plan.placement,
        lambda stage, micro_batch: stage * widest + replicas[stage][micro_batch],
        by_replica,
        [
            sum(plan.layers[layer].forward_flops for layer in plan.layers_of(chunk))
            for chunk in range(len(plan.placement))
        ],
        {
            stage * widest + replica: cap
            for stage, cap in enumerate(_caps(plan))
            for replica in range(plan.stage_replicas.replicas(stage))
        },
    )


def _caps(plan: Plan) -> tuple[int, ...]:
    """By stage, the most chunk activations that a stage replica may keep if stages differ."""
    regular = list(map(plan.activation_bytes, plan.configured_layers))
    longest = -(-sum(map(len, plan.micro_batches)) // plan.configured_mesh.data)
    fullest = max(
        peak_in_flight(program, size=regular.__getitem__)
        for program in compute_programs(
            plan.schedule, plan.configured_mesh.pipeline, plan.virtual, longest
        )
    )
    most = (1 + plan.activation_headroom) * fullest
    return stage_caps(plan.placement, list(map(plan.activation_bytes, plan.chunk_layers)), most)
