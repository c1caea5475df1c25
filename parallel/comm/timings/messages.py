"""How long messages took, by the clocks of the ranks at both ends.

A message begins to move once its source is ready and its destination has posted the receive, and
has come when the destination sees its end. The end that the source sees says little: it is that of
the copy to its kernel, which holds megabytes. So the source's clock is needed for one instant, and
is compared with the destination's. Ranks of one machine share a clock. Between machines a ring of
short messages in both directions tells how clocks differ: half of the difference of what both
directions seem to take, as far as both take equally long (Mills 1991).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TimedMessage:
    """A message that has come."""

    source: int
    """The global rank that sent it."""
    destination: int
    kind: str
    """Messages of one kind go over links of one class, in the same way: only these are compared."""
    bytes: int
    seconds: float
    """The time that it moved."""
    is_bound: bool = False
    """Whether it may have been quicker: the destination saw that it had come only when it asked."""
    stands_for: float = 1.0
    """The messages between both ranks that it is a sample of."""


@dataclass(frozen=True, slots=True)
class NeighbourTimes:
    """What a rank knows of the clocks of its neighbours in the ring of all ranks."""

    machine: int
    """Equal on ranks that share a clock."""
    from_before_s: float
    """The shortest time that a message from the rank before seemed to take: the time of its coming
    by this rank's clock less that of its leaving by the other's."""
    from_after_s: float
    """The same of the rank after."""


def clock_offsets(ring: Sequence[NeighbourTimes]) -> list[float]:
    """By rank of a ring, its clock less that of the first, in seconds. Pure."""
    offsets = [0.0]
    for before, here in itertools.pairwise(ring):
        step_s = (here.from_before_s - before.from_after_s) / 2
        offsets.append(offsets[-1] + (0.0 if here.machine == before.machine else step_s))
    return offsets


def moved_s(ready_s: float, posted_s: float, come_s: float) -> float:
    """The time that a message moved. Pure; all by one clock.

    Args:
        ready_s: when its source was ready.
        posted_s: when its destination had posted the receive.
    """
    return come_s - max(ready_s, posted_s)
