"""Readiness: which buckets of a step's sums have all their contributions on this rank.

The training thread tells; other threads wait. Local.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable

import torch
from torch import nn

from holdfast.parallel.errors import PeerLost


class Readiness:
    """The parameters of one step that are still to get a gradient, and the waits for them."""

    def __init__(self, device: torch.device) -> None:
        """No step has begun: nothing is complete."""
        self._device = device
        self._complete: set[nn.Parameter] = set()
        self._is_cancelled = False
        self._changed = threading.Condition()
        self._marks: dict[nn.Parameter, torch.cuda.Event] = {}
        """The points of the computing stream after which a parameter's sums are there."""

    def begin(self) -> None:
        """Begin a step: nothing is complete."""
        with self._changed:
            self._complete.clear()
            self._marks.clear()
            self._is_cancelled = False

    def complete(self, parameters: Iterable[nn.Parameter]) -> None:
        """The sums of these parameters get no further contribution in this step."""
        mark = None
        if self._device.type == "cuda":
            mark = torch.cuda.Event()
            mark.record(torch.cuda.current_stream(self._device))
        with self._changed:
            for parameter in parameters:
                self._complete.add(parameter)
                if mark is not None:
                    self._marks[parameter] = mark
            self._changed.notify_all()

    def cancel(self) -> None:
        """End all waits: the step is interrupted."""
        with self._changed:
            self._is_cancelled = True
            self._changed.notify_all()

    def wait(self, parameters: frozenset[nn.Parameter]) -> None:
        """Wait until all of these are complete; on a GPU, the current stream waits for them.

        Raises:
            PeerLost: the step was cancelled.
        """
        with self._changed:
            while not (self._is_cancelled or parameters <= self._complete):
                self._changed.wait()
            if self._is_cancelled:
                raise PeerLost("the step was interrupted")
            marks = {self._marks[p] for p in parameters} if self._marks else ()
        for mark in marks:
            torch.cuda.current_stream(self._device).wait_event(mark)
