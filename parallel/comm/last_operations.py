"""The newest operations of a rank, as evidence keeps them. Pure."""

from __future__ import annotations

import math

from holdfast.parallel.comm.flight_recorder import FlightRecord, Operation
from holdfast.parallel.output import LastOperation

_KEPT = 16


def last_operations(record: FlightRecord, now_s: float) -> tuple[LastOperation, ...]:
    """The newest operations of a record in the order of their calls, the open ones in any case.

    Args:
        now_s: the time of the monotonic clock of the record's machine.
    """
    newest = tuple(record.operations)
    kept = [o for o in newest[:-_KEPT] if o.is_waited_for][-_KEPT:] + list(newest[-_KEPT:])
    return tuple(_kept(operation, now_s) for operation in kept)


def _kept(operation: Operation, now_s: float) -> LastOperation:
    waited_s = 0.0
    if not math.isnan(operation.waited_s):
        ended = operation.outcome != "open"
        waited_s = (operation.finished_s if ended else now_s) - operation.waited_s
    return LastOperation(
        operation=operation.operation,
        direction=operation.direction,
        peer=operation.peer,
        group=operation.group,
        tag=operation.tag,
        bytes=operation.bytes,
        outcome=operation.outcome,
        posted_s=max(0.0, now_s - operation.posted_s),
        waited_s=max(0.0, waited_s),
    )


def busy_text(record: FlightRecord, now_s: float) -> str:
    """The work without messages that a rank does, for a person; empty if there is none."""
    if record.busy is None:
        return ""
    left_s = record.busy_until_s - now_s
    until = f"for {left_s:.0f} s more at most" if left_s >= 0 else f"until {-left_s:.0f} s before"
    return f"it said that it would {record.busy} {until}"
