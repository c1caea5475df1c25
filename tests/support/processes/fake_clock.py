"""A clock that moves when it is told to, or by what is slept."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class FakeClock:
    """Seconds since some moment."""

    now_s: float = 1000.0
    slept_s: list[float] = field(default_factory=list)

    def __call__(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        """Sleep no time at all."""
        self.slept_s.append(seconds)
        self.now_s += seconds
