"""The order of work of teams, whose ranks compute at the same time: experts need all of them.

A step's micro-batches are cut into *waves*. Each stage takes the waves in the order in which the
schedule would take as many micro-batches, and of each wave every replica the micro-batches that it
has: the others of its team wait with their experts where it has more than they. So all ranks of a
team have passages of the same chunks in the same order, and ranks of different stages cannot wait
in a circle, whatever the assignment. Pure; needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from holdfast.parallel.layout import Coordinates
from holdfast.parallel.plan.plan import Plan
from holdfast.parallel.schedules import Program

Waves = tuple[tuple[int, ...], ...]
"""The micro-batches of each wave, in order."""


def waves_of(
    order: Sequence[int], replicas: Sequence[Mapping[int, int]], sizes: Sequence[Sequence[int]]
) -> Waves:
    """The waves of a step: of equal size, so that the last stage is done as early as it can be.

    Args:
        order: the micro-batches, as they should enter.
        replicas: by stage, the replica that computes each micro-batch.
        sizes: by stage, the ranks of each of its replicas.
    """

    def time(waves: Waves) -> float:
        slowest = 0.0
        for of_stage, ranks in zip(replicas, sizes, strict=True):
            total = 0.0
            for numbers in waves:
                took = [0.0] * len(ranks)
                for number in numbers:
                    took[of_stage[number]] += max(ranks) / ranks[of_stage[number]]
                total += max(took)
            slowest = max(slowest, total * (1 + (len(sizes) - 1) / len(waves)))
        return slowest

    widths = sorted({len(ranks) for ranks in sizes})
    found = [
        tuple(tuple(order[first : first + width]) for first in range(0, len(order), width))
        for width in widths
    ]
    return min(found, key=time)


def team_program(
    plan: Plan,
    at: Coordinates,
    waves: Waves,
    programs: Sequence[Program],
    replicas: Mapping[int, int],
) -> Program:
    """The compute actions of a rank of a team, without messages.

    Where its replica has fewer micro-batches of a wave than another one of the team, actions have
    negative micro-batches: experts work for others alone.

    Args:
        programs: by stage, the actions of one replica with a micro-batch for each wave, or more.
        replicas: the replica of this stage that computes each micro-batch.
    """
    team = plan.team_of(at.pipeline, at.data)
    numbers = [_numbers(wave, at.data, team, replicas) for wave in waves]
    names: list[tuple[int, ...]] = []
    fewer = 0
    for own, most in numbers:
        waiting = range(fewer + 1, fewer + 1 + most - len(own))
        names.append((*own, *(-number for number in waiting)))
        fewer += len(waiting)
    return tuple(
        replace(action, micro_batch=number)
        for action in programs[at.pipeline]
        if action.micro_batch < len(waves)
        for number in names[action.micro_batch]
    )


def _numbers(
    wave: Sequence[int], replica: int, team: range, replicas: Mapping[int, int]
) -> tuple[tuple[int, ...], int]:
    """The micro-batches of a replica in a wave, and the most that one of its team has."""
    counts = dict.fromkeys(team, 0)
    for number in wave:
        if replicas[number] in counts:
            counts[replicas[number]] += 1
    own = tuple(number for number in wave if replicas[number] == replica)
    return own, max(counts.values())
