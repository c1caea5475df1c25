"""Ended saves and uploads as events and in words. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from holdfast.checkpoint.saving import SaveResult
from holdfast.checkpoint.tiers import UploadResult


def checkpoint_fields(result: SaveResult | UploadResult) -> dict[str, Any]:
    """The fields of a checkpoint's event."""
    if isinstance(result, UploadResult):
        return {
            "step": result.step,
            "tier": "remote",
            "bytes": result.bytes,
            "stall_s": 0.0,
            "total_s": result.total_s,
            "path": result.url,
        }
    # Of a save that failed, the times of the other ranks are not known.
    rank, phase = (None, "") if result.error else result.slowest
    return {
        "step": result.step,
        "tier": result.tier,
        "bytes": result.bytes,
        "stall_s": max((times["stall_s"] for times in result.times.values()), default=0.0),
        "total_s": result.total_s,
        "commit_s": result.commit_s,
        "path": str(result.path or ""),
        "imbalance": result.imbalance,
        "slowest_rank": rank,
        "slowest_phase": phase,
        "ranks": {str(r): dict(times) for r, times in result.times.items()},
    }


@dataclass(slots=True)
class SaveFailures:
    """The failed saves of a run: a reason is told once until a save succeeds, all at the end."""

    steps: list[int] = field(default_factory=list)
    """The steps of the saves that failed."""
    reason: str = ""
    """The reason of the last one."""
    _told: dict[str, str] = field(default_factory=dict)
    """The reason that was told last, without its numbers, by tier; none after a success."""

    def failed(self, tier: str, step: int, error: str) -> str:
        """Note a failed save. Returns the line for a person; empty if it was told already."""
        self.steps.append(step)
        self.reason = error
        kind = re.sub(r"\d+", "", error)
        if self._told.get(tier) == kind:
            return ""
        self._told[tier] = kind
        return f"checkpoint of step {step} failed: {error}"

    def succeeded(self, tier: str) -> None:
        """Note a committed save."""
        self._told.pop(tier, None)

    def summary(self) -> str:
        """The line at the end of the run; empty if no save failed."""
        if not self.steps:
            return ""
        steps = ", ".join(map(str, dict.fromkeys(self.steps)))
        return f"checkpoints of steps {steps} failed; the last reason: {self.reason}"


def describe_save(result: SaveResult | UploadResult) -> str:
    """One line about a save that was committed."""
    size = f"{result.bytes / 2**20:,.0f} MiB in {result.total_s:.2f} s"
    if isinstance(result, UploadResult):
        return f"checkpoint of step {result.step} uploaded: {size}"
    rank, phase = result.slowest
    stall = max((times["stall_s"] for times in result.times.values()), default=0.0)
    return (
        f"checkpoint of step {result.step} ({result.tier}): {size}, stall {1000 * stall:.1f} ms, "
        f"slowest rank {rank} ({phase})"
    )
