"""What a piece reports."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Status = Literal["ran", "skipped", "failed"]


class SkippedPiece(Exception):
    """A piece cannot run here; the message is the reason."""


@dataclass(frozen=True, slots=True)
class Report:
    """A piece's result."""

    name: str
    status: Status
    reason: str = ""
    """Why it was skipped, or the last line of what it failed with."""
    numbers: dict[str, Any] = field(default_factory=dict)
    wall_s: float = 0.0
