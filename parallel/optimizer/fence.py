"""The fence: protects optimizer state from being overwritten while a snapshot copies it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class Fence(Protocol):
    """A function that is called before blocks are updated."""

    def __call__(self, number: int) -> int:
        """Return once block `number` may change; the number of all blocks waits for every copy.

        Returns:
            The highest number that may change as well.
        """
        ...


@dataclass(frozen=True, slots=True)
class BlockNumbers:
    """The numbers of a rank's blocks for one fence: in the order of their updates.

    Shadowed blocks that are saved count from 0; owned blocks follow them.
    """

    shadowed: int
    """The number of shadowed blocks if checkpoints are taken from shadows; otherwise 0."""
    owned: int

    def of_owned(self, position: int) -> int:
        """The number of the owned block at a position; past the last, the number of all blocks."""
        return self.shadowed + position

    def fence_of_owned(self, fence: Fence) -> Fence:
        """The same fence by position among the owned blocks."""
        return lambda number: fence(self.of_owned(number)) - self.shadowed

    def fence_of_shadows(self, fence: Fence) -> Fence | None:
        """The same fence by position among the shadowed blocks; None if none of these is saved."""
        return fence if self.shadowed else None
