"""The job of a save, and its result."""

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
    """What one save writes, and where. Equal on every rank but for `source` and `before`."""

    step: int
    store: LocalStore
    """The folder of checkpoints."""
    tier: str
    """"memory" or "disk"."""
    plan: WritePlan
    source: Source
    before: Callable[[PlannedPiece], int] = field(default=lambda piece: 0)
    """The fence number of each piece; see `Snapshot`."""
    scalars: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    extra_files: Mapping[str, bytes] = field(default_factory=dict)
    """Contents of small files of the checkpoint, by name; the coordinator writes them. Other ranks
    need not give them."""
    retention: Retention = field(default_factory=Retention)
    """The older checkpoints that stay."""
    pinned: bool = False
    """Whether page-locked memory helps, because the state is on a GPU. The first save decides."""


@dataclass(frozen=True, slots=True)
class SaveResult:
    """The result of a save; of a committed one it has the times of all ranks."""

    step: int
    tier: str
    path: Path | None
    """None when it failed."""
    error: str
    bytes: int
    total_s: float
    times: Mapping[int, Mapping[str, float]]
    """By rank: stall_s, copy_s, write_s, sync_s."""
    commit_s: float = 0.0
    note: str = ""
    """What a person should know of a committed save; see `holdfast.checkpoint.stores.commit`."""
    imbalance: float = 1.0
    """The bytes of the rank that wrote most, over the mean."""

    @property
    def slowest(self) -> tuple[int, str]:
        """The rank that took longest, and its longest phase."""
        rank, phase, _ = max(
            ((r, p, s) for r, t in self.times.items() for p, s in t.items() if p != "stall_s"),
            key=lambda found: found[2],
            default=(0, "begin_s", 0.0),
        )
        return rank, phase.removesuffix("_s")
