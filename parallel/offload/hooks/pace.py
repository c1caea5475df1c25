"""Limits how far the host may run ahead of the GPU.

Work is queued long before it runs, and memory is allocated when work is queued.
"""

from __future__ import annotations

from collections import deque

import torch

_QUEUED = 4
"""The saved storages whose computation stays queued, so that a wait for memory stalls nothing."""


class Pace:
    """Tells whether the host may wait without the device running out of work. Local."""

    def __init__(self) -> None:
        self._events: deque[torch.cuda.Event] = deque(maxlen=_QUEUED)

    def note(self, device: torch.device) -> None:
        """Mark the end of the device's queue: a storage was just saved."""
        event = self.mark(device)
        if event is not None:
            self._events.append(event)

    def mark(self, device: torch.device) -> torch.cuda.Event | None:
        """The end of the device's queue now; once it is past, the device has nothing left to do."""
        if device.type != "cuda":
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(device))
        return event

    def is_ahead(self) -> bool:
        """Whether enough work is queued that the host may wait; always False for the CPU."""
        return len(self._events) == _QUEUED and not self._events[0].query()
