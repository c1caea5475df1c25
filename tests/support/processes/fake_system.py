"""An operating system for supervisors of processes that are not there."""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field


@dataclass
class FakeSystem:
    """Children that end when the test says so, and a clock that moves by the time-out of each
    wait.
    """

    time_s: float = 0.0
    codes: dict[int, int] = field(default_factory=dict)
    """Exit codes by process id of children that have ended."""
    waited_s: list[float | None] = field(default_factory=list)
    log: list[tuple[str, int]] = field(default_factory=list)
    on_wait: Callable[[float], None] = lambda now_s: None
    """Called in each wait with the time at its end: what the test has happen meanwhile."""

    def now_s(self) -> float:
        return self.time_s

    def open(self, pid: int) -> int:
        return pid + 1000

    def wait(self, descriptors: Sequence[int], timeout_s: float | None) -> list[int]:
        self.waited_s.append(timeout_s)
        self.time_s += timeout_s or 0.0
        self.on_wait(self.time_s)
        return [found for found in descriptors if found - 1000 in self.codes]

    def signal(self, descriptor: int, number: int) -> None:
        self.log.append((signal.Signals(number).name, descriptor - 1000))
        if number == signal.SIGKILL:
            self.codes.setdefault(descriptor - 1000, -number)

    def kill_group(self, pid: int) -> None:
        self.log.append(("group", pid))

    def reap(self, descriptor: int, pid: int) -> int:
        self.log.append(("reap", pid))
        return self.codes[pid]
