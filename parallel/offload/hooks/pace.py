"""Limits how far the host may run ahead of the GPU.

Work is queued long before it runs, and memory is allocated when work is queued.
"""

from __future__ import annotations

from collections import deque

import torch

from holdfast.parallel.offload.policy import HostMoment, Moment

_QUEUED = 4
"""The saved storages whose computation stays queued, so that a wait for memory stalls nothing."""


class Pace:
    """Tells whether the host may wait without the device running out of work. Local."""

    def __init__(self) -> None:
        self._events: deque[Moment] = deque(maxlen=_QUEUED)

    def note(self, device: torch.device) -> None:
        """Mark the end of the device's queue: a storage was just saved."""
        if device.type == "cuda":
            self._events.append(end_of_queue(device))

    def is_ahead(self) -> bool:
        """Whether enough work is queued that the host may wait; always False for the CPU."""
        return len(self._events) == _QUEUED and not self._events[0].query()


def end_of_queue(device: torch.device) -> Moment:
    """The end of the device's queue now; once it is past, the device has nothing left to do."""
    if device.type != "cuda":
        return HostMoment()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event
