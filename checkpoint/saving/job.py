"""What is asked of a save, and how it ended."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from holdfast.checkpoint.format import PlannedPiece, WritePlan
from holdfast.checkpoint.stores import LocalStore, Retention
from holdfast.parallel.layout import Box

Source = Callable[[str, Box], Tensor]
"""(tensor, box) -> this rank's live values of that box: contiguous, any device."""


@dataclass(frozen=True, slots=True)
class SaveJob:
    """What is saved, and where. Equal on every rank but for `source` and `before`."""

    step: int
    store: LocalStore
    """The folder of checkpoints."""
    tier: str
    """"memory" or "disk"."""
    plan: WritePlan
    source: Source
    before: Callable[[PlannedPiece], int] = field(default=lambda piece: 0)
    """The fence of each piece; see `Snapshot`."""
    scalars: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    extra_files: Mapping[str, bytes] = field(default_factory=dict)
    """Small files that are part of the checkpoint; the coordinator's are written."""
    retention: Retention = field(default_factory=Retention)
    pinned: bool = False
    """Whether page-locked memory helps: the state is on a GPU. The first save decides."""


@dataclass(frozen=True, slots=True)
class SaveResult:
    """How a save ended; on the coordinator with the times of all ranks."""

    step: int
    tier: str
    path: Path | None
    """None when it failed."""
    error: str
    bytes: int
    total_s: float
    times: Mapping[int, Mapping[str, float]]
    """By rank: stall_s, copy_s, write_s, sync_s; this rank alone on others than the coordinator."""
    commit_s: float = 0.0
    imbalance: float = 1.0
    """Bytes of the rank that wrote most over the mean."""

    @property
    def slowest(self) -> tuple[int, str]:
        """The rank that took longest, and the phase in which it did."""
        rank, phase, _ = max(
            ((r, p, s) for r, t in self.times.items() for p, s in t.items() if p != "stall_s"),
            key=lambda found: found[2],
            default=(0, "begin_s", 0.0),
        )
        return rank, phase.removesuffix("_s")
