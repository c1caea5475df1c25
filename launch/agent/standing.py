"""The standing of a node: whether it has a part in the run, and whether there is a run. Pure."""

from __future__ import annotations

from collections.abc import Callable, Collection

from holdfast.elastic import RunEnd
from holdfast.launch.agent.worker_slot import WorkerSlot
from holdfast.parallel.errors import Stopped

_ASK_S = 0.5


class Standing:
    """How long a node has had no part in the run. The time is passed in.

    A node has a part while one of its workers is in a generation. It has none while all of them
    try to agree: before the first generation, without a majority, without a Lighthouse, with too
    few ranks, or because it was cut off and the others have gone on.
    """

    def __init__(self, limit_s: float, ended: Callable[[], RunEnd | None]) -> None:
        """Nothing has been started.

        Args:
            limit_s: seconds without a part in the run after which the node ends.
            ended: how the run has ended, as far as it can be known here. Only asked while the node
                has no part in it.
        """
        self._limit_s, self._ended = limit_s, ended
        self._apart_since_s: float | None = None
        self._ask_at_s = 0.0

    def note_queued(self, now_s: float) -> None:
        """Note that others train, and that a worker of this node waits to be admitted."""
        self._apart_since_s = now_s

    def look(
        self, slots: Collection[WorkerSlot], now_s: float, *, held_back: bool = False
    ) -> RunEnd | None:
        """Why the node ends now: with the run, or because it has been apart too long; else None.

        Args:
            held_back: whether workers that are not started yet wait for a step of the run.
        """
        if (held_back and not any(slot.pid for slot in slots)) or any(
            slot.is_inside for slot in slots
        ):
            self._apart_since_s = None
            return None
        if self._apart_since_s is None:
            self._apart_since_s = now_s
        if now_s >= self._ask_at_s:
            self._ask_at_s = now_s + _ASK_S
            if (end := self._ended()) is not None:
                return end
        if now_s - self._apart_since_s > self._limit_s:
            reason = f"it has had no part in the run for {self._limit_s:g} s (elastic.apart_s)"
            return RunEnd(Stopped.exit_code, reason)
        return None
