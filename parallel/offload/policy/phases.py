"""Times of a step's forward and backward passes, and of the drive's transfers within them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from time import perf_counter
from typing import Any, Literal, Protocol

Phase = Literal["forward", "backward"]


class Moment(Protocol):
    """A moment of the device that computes, as `torch.cuda.Event` is one of a GPU."""

    def query(self) -> bool:
        """Whether the moment is past."""
        ...

    def elapsed_time(self, end_event: Any) -> float:
        """Milliseconds from this moment to a later one of the same device; both are past."""
        ...


class HostMoment:
    """A moment of the CPU, which computes when it is called."""

    def __init__(self, clock: Callable[[], float] = perf_counter) -> None:
        self._at_s = clock()

    def query(self) -> bool:
        return True

    def elapsed_time(self, end_event: HostMoment) -> float:
        return (end_event._at_s - self._at_s) * 1e3


@dataclass(frozen=True, slots=True)
class Begin:
    """The beginning of a phase."""

    phase: Phase
    moment: Moment
    busy_s: float
    """Seconds of transfers so far, when the host noted it."""


@dataclass(frozen=True, slots=True)
class StepPhases:
    """The phases of an ended step. The last moment ends it, and begins nothing."""

    begins: tuple[Begin, ...]

    @property
    def is_past(self) -> bool:
        """Whether the device has come to the end of the step."""
        return self.begins[-1].moment.query()

    def seconds(self) -> dict[Phase, float]:
        """The time of the device by phase; the step is past."""
        found: dict[Phase, float] = {"forward": 0.0, "backward": 0.0}
        for a, b in pairwise(self.begins):
            found[a.phase] += a.moment.elapsed_time(b.moment) / 1e3
        return found

    def busy_s(self, written_bytes: int, read_bytes: int) -> dict[Phase, float]:
        """The time of transfers by the phase that has to hide it.

        A GPU comes to a moment long after the host has noted it, so how long transfers took until
        then is not known: forward passes hide what is written, backward passes what is read.
        """
        if isinstance(self.begins[-1].moment, HostMoment):
            found: dict[Phase, float] = {"forward": 0.0, "backward": 0.0}
            for a, b in pairwise(self.begins):
                found[a.phase] += b.busy_s - a.busy_s
            return found
        busy_s = self.begins[-1].busy_s - self.begins[0].busy_s
        written = written_bytes / max(1, written_bytes + read_bytes)
        return {"forward": busy_s * written, "backward": busy_s * (1 - written)}


class Phases:
    """The phases of the step under way, by what is saved and needed. Local."""

    def __init__(self) -> None:
        self._begins: list[Begin] = []

    def restart(self) -> None:
        """Begin a step."""
        self._begins = []

    def at(self, phase: Phase, moment: Callable[[], Moment], busy_s: Callable[[], float]) -> None:
        """Note that `phase` is under way; the time until another one begins counts for it."""
        if not self._begins or self._begins[-1].phase != phase:
            self._begins.append(Begin(phase, moment(), busy_s()))

    def finish(self, moment: Moment, busy_s: float) -> StepPhases:
        """End the step."""
        return StepPhases((*self._begins, Begin("backward", moment, busy_s)))
