"""The order of work where stages differ in their replicas, so that activations cross pipelines.

Small plans are list-scheduled as a whole with split backwards, so that weight gradients fill what
would be idle time (the decoupled backward of ReCycle, Gandhi et al. 2024); for large ones every
stage replica merges what it computes in the order of the regular schedule, which needs no knowledge
of the others. Pure; needs no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from holdfast.parallel.schedules import (
    Action,
    Op,
    Program,
    list_schedule,
    simulate,
    unit_cost,
)

SCHEDULED_PAIRS = 8192
"""Chunks times micro-batches up to which a step is list-scheduled: some 0.2 s, once a change."""
_THOROUGH_PAIRS = 1024
"""The same, up to which all rules of the list scheduler are tried."""

RegularTimeline = tuple[Mapping[int, Sequence[tuple[float, int, Op, int]]], ...]
"""By stage and place in the pipeline: actions as (start when regular, order, op, chunk)."""


def regular_timeline(programs: Sequence[Program]) -> RegularTimeline:
    """When a replica that computes all its micro-batches itself would run each action."""
    timeline = simulate(dict(enumerate(programs)), unit_cost())
    found: list[dict[int, list[tuple[float, int, Op, int]]]] = []
    for stage in range(len(programs)):
        by_number: dict[int, list[tuple[float, int, Op, int]]] = {}
        for order, span in enumerate(timeline.spans.get(stage, ())):
            action = span.action
            entry = (span.start, order, action.op, action.chunk)
            by_number.setdefault(action.micro_batch, []).append(entry)
        found.append(by_number)
    return tuple(found)


def merged_program(
    numbers: Sequence[int], places: Mapping[int, int], timeline: RegularTimeline, stage: int
) -> Program:
    """The compute actions of a stage replica whose micro-batches come from several replicas.

    Each micro-batch keeps its place in the pipeline that it began in, and every rank takes its
    actions in the order in which that regular schedule would run them. Since an action's time there
    lies after those of all that it needs, ranks cannot wait in a circle, whatever the assignment.

    Args:
        numbers: the stage replica's micro-batches.
        places: of each micro-batch in its row.
    """
    found = [
        (start, number, order, op, chunk)
        for number in numbers
        for start, order, op, chunk in timeline[stage][places[number]]
    ]
    return tuple(Action(op, chunk, number) for _, number, _, op, chunk in sorted(found))


def stage_caps(
    placement: Sequence[int], chunk_bytes: Sequence[float], most_bytes: float
) -> tuple[int, ...]:
    """By stage, how many activations of its chunks fit in a memory; at least one of each. Pure.

    Args:
        placement: the stage of each chunk.
        chunk_bytes: of one micro-batch's activations, by chunk.
    """
    found = []
    for stage in range(max(placement) + 1):
        sizes = [size for at, size in zip(placement, chunk_bytes, strict=True) if at == stage]
        found.append(max(len(sizes), int(most_bytes // max(1.0, *sizes))))
    return tuple(found)


def scheduled_programs(
    placement: Sequence[int],
    replica_of: Callable[[int, int], int],
    by_replica: Sequence[Sequence[int]],
    work: Sequence[float],
    caps: Mapping[int, int],
) -> dict[int, Program]:
    """The compute actions of all stage replicas, by number, in as little time as the list scheduler
    finds.

    Args:
        placement: the stage of each chunk.
        replica_of: (stage, micro-batch) -> the stage replica that computes it, by any number.
        rows: the micro-batches of each replica that a full mesh would have, in order; those left
            out are not computed.
        work: of one micro-batch's forward pass, by chunk.
        caps: the chunk activations that each stage replica may keep at once, by the same numbers.
    """
    longest = max(map(len, by_replica))
    entering = [row[place] for place in range(longest) for row in by_replica if place < len(row)]
    times = {
        Op.FORWARD: 1,
        Op.BACKWARD: 2,
        Op.BACKWARD_INPUT: 1,
        Op.BACKWARD_WEIGHT: 1,
    }
    return list_schedule(
        len(placement),
        entering,
        lambda chunk, micro_batch: replica_of(placement[chunk], micro_batch),
        lambda action: times[action.op] * max(1.0, work[action.chunk]),
        cap=caps,
        split_backward=True,
        all_rules=len(placement) * len(entering) <= _THOROUGH_PAIRS,
    )
