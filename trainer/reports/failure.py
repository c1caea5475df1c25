"""The evidence that a worker keeps of the error that ends it, and of its GPU's memory. Local."""

from __future__ import annotations

import contextlib
import logging
import os
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from holdfast.parallel.comm import FlightRecord, FlightRecorder, last_operations
from holdfast.parallel.errors import HoldfastError
from holdfast.parallel.output import (
    Evidence,
    ThreadStack,
    evidence_name,
    frames_of_error,
    memory_of,
    own_threads,
    write_evidence,
)

logger = logging.getLogger("holdfast")

_MOST_CHARACTERS = 1 << 16
_TOLD = 8
"""The newest operations that are told with an error."""


def is_failure(error: BaseException) -> bool:
    """Whether evidence is kept of an error: it says in no words of ours what was wrong."""
    return isinstance(error, Exception) and not isinstance(error, HoldfastError)


def note_operations(error: BaseException, recorder: FlightRecorder) -> None:
    """Add a rank's newest operations to an error, as its notes: they are told with it."""
    if is_failure(error):
        newest = last_operations(recorder.record(), time.monotonic())[-_TOLD:]
        for operation in newest:
            error.add_note(f"operation before: {operation.line()}")


def failure_evidence(
    error: BaseException,
    rank: int,
    *,
    incidents: Path,
    incarnation: int = 0,
    record: FlightRecord | None = None,
) -> Evidence:
    """The evidence of the error that ends this worker.

    If its GPU is out of memory, the allocations are written to `incidents`, for torch's viewer.

    Args:
        incidents: the folder of the run's incidents.
        record: its flight record, if it can be read.
    """
    frames = frames_of_error(error)
    stacks = own_threads()
    return Evidence(
        role="failed",
        rank=rank,
        incarnation=incarnation,
        pid=os.getpid(),
        reason=f"{type(error).__name__}: {error}"[:_MOST_CHARACTERS],
        generation=record.generation if record is not None else 0,
        step=record.step if record is not None else 0,
        operations=last_operations(record, time.monotonic()) if record is not None else (),
        stacks=(ThreadStack(stacks[0].name, frames), *stacks[1:]),
        memory=memory_of(os.getpid()),
        device=device_facts(),
        error="".join(traceback.format_exception(error))[-_MOST_CHARACTERS:],
        snapshot=_snapshot(error, incidents, rank),
    )


def keep_failure(
    error: BaseException,
    rank: int,
    incidents: Path,
    path: Path | None = None,
    *,
    incarnation: int = 0,
    record: FlightRecord | None = None,
) -> None:
    """Write the evidence of an error that ends this worker, if it is a failure. Raises nothing.

    Args:
        path: the file; None: one of the incidents.
        incarnation, record: as of `failure_evidence`.
    """
    if not is_failure(error):
        return
    try:
        evidence = failure_evidence(
            error, rank, incidents=incidents, incarnation=incarnation, record=record
        )
        write_evidence(path or incidents / evidence_name("failed", str(rank)), evidence)
    except Exception as trouble:
        logger.warning("no evidence of this: %s", trouble)


def device_facts() -> dict[str, Any]:
    """The memory of this process's GPU, as torch counts it; empty if it uses none."""
    if not torch.cuda.is_initialized():
        return {}
    free, total = torch.cuda.mem_get_info()
    stats = torch.cuda.memory_stats()
    names = ("allocated_bytes.all.current", "allocated_bytes.all.peak", "num_ooms")
    names += ("reserved_bytes.all.current", "inactive_split_bytes.all.current")
    found = {name: stats[name] for name in names if name in stats}
    return {"name": torch.cuda.get_device_name(), "free": free, "total": total, **found}


def _snapshot(error: BaseException, incidents: Path, rank: int) -> str:
    """The name of the file with the GPU's allocations; empty unless it is out of memory."""
    if not isinstance(error, torch.OutOfMemoryError) or not torch.cuda.is_initialized():
        return ""
    path = incidents / evidence_name("failed", str(rank)).replace(".json", "-memory.pickle")
    with contextlib.suppress(OSError):
        path.parent.mkdir(exist_ok=True)
        torch.cuda.memory._dump_snapshot(str(path))
        return path.name
    return ""
