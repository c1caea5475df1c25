"""The order of work if stages differ in their replicas, so that activations cross pipelines.

Small plans are list-scheduled as a whole with split backwards: weight gradients fill idle time (the
decoupled backward of ReCycle, Gandhi et al. 2024). In large plans, every stage replica merges its
micro-batches in the order of the regular schedule, without knowledge of the others. Pure; needs no
torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from holdfast.parallel.schedules import (
    Action,
    Op,
    Program,
    list_schedule,
    simulate,
    unit_cost,
)

SCHEDULED_PAIRS = 8192
"""The chunks times micro-batches up to which a step is list-scheduled: some 0.2 s per change."""
_THOROUGH_PAIRS = 1024
"""The chunks times micro-batches up to which all rules of the list scheduler are tried."""

RegularTimeline = tuple[Mapping[int, Sequence[tuple[float, int, Action]]], ...]
"""By stage and index in the pipeline: actions as (start in the regular schedule, order, action)."""


def regular_timeline(programs: Sequence[Program]) -> RegularTimeline:
    """The time of each action in a replica that computes all its micro-batches itself."""
    timeline = simulate(dict(enumerate(programs)), unit_cost())
    found: list[dict[int, list[tuple[float, int, Action]]]] = []
    for stage in range(len(programs)):
        by_number: dict[int, list[tuple[float, int, Action]]] = {}
        for order, span in enumerate(timeline.spans.get(stage, ())):
            entry = (span.start, order, span.action)
            by_number.setdefault(span.action.micro_batch, []).append(entry)
        found.append(by_number)
    return tuple(found)


def merged_program(
    numbers: Sequence[int], places: Mapping[int, int], timeline: RegularTimeline, stage: int
) -> Program:
    """The compute actions of a stage replica with micro-batches of several replicas.

    Each micro-batch keeps its index in the pipeline that it began in, and every rank takes its
    actions in the order in which the regular schedule would run them. An action's time there is
    later than those of all actions it needs, so ranks cannot wait in a circle, whatever the
    assignment.

    Args:
        numbers: the stage replica's micro-batches.
        places: the position of each micro-batch among those of its replica.
    """
    found = [
        (start, number, order, action)
        for number in numbers
        for start, order, action in timeline[stage][places[number]]
    ]
    return tuple(
        replace(action, micro_batch=number)
        for _, number, _, action in sorted(found, key=lambda entry: entry[:3])
    )


def stage_caps(
    placement: Sequence[int], chunk_bytes: Sequence[float], most_bytes: float
) -> tuple[int, ...]:
    """By stage, how many activations of its chunks fit in a memory; at least one of each. Pure.

    Args:
        placement: the stage of each chunk.
        chunk_bytes: the bytes of one micro-batch's activations, by chunk.
        most_bytes: the bytes of the memory.
    """
    found = []
    for stage in range(max(placement) + 1):
        sizes = [size for at, size in zip(placement, chunk_bytes, strict=True) if at == stage]
        found.append(max(len(sizes), int(most_bytes // max(1.0, *sizes))))
    return tuple(found)


def scheduled_programs(
    placement: Sequence[int],
    replica_of: Callable[[int, int], int],
    entering: Sequence[int],
    work: Sequence[float],
    slowness: Mapping[int, float],
    caps: Mapping[int, int],
) -> dict[int, Program]:
    """The compute actions of all stage replicas, by number, in the shortest order found.

    Args:
        placement: the stage of each chunk.
        replica_of: (stage, micro-batch) -> the number of the stage replica that computes it.
        entering: the micro-batches to compute, in the order in which they should enter.
        work: the operations of one micro-batch's forward pass, by chunk.
        slowness: how many times as long each stage replica takes for it, by the same numbers.
        caps: the most chunk activations of each stage replica at once, by the same numbers.
    """
    times = {
        Op.FORWARD: 1,
        Op.BACKWARD: 2,
        Op.BACKWARD_INPUT: 1,
        Op.BACKWARD_WEIGHT: 1,
    }

    def owner_of(chunk: int, micro_batch: int) -> int:
        return replica_of(placement[chunk], micro_batch)

    def cost(action: Action) -> float:
        slow = slowness[owner_of(action.chunk, action.micro_batch)]
        return times[action.op] * max(1.0, work[action.chunk]) * slow

    return list_schedule(
        len(placement),
        entering,
        owner_of,
        cost,
        cap=caps,
        split_backward=True,
        all_rules=len(placement) * len(entering) <= _THOROUGH_PAIRS,
    )
