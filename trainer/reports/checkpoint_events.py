"""Ended saves and uploads as events and in words. Pure."""

from __future__ import annotations

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
    rank, phase = result.slowest
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
