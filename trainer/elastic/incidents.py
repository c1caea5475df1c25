"""The record of a membership change: events, and one file for each incident."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from holdfast.elastic import (
    CHANGES,
    Generation,
    MembershipEvent,
    change_events,
    event_to_data,
    newest_start,
)
from holdfast.parallel.output import WholeFiles
from holdfast.parallel.plan import Plan, incoming_blocks, plan_to_data
from holdfast.trainer.elastic.recovery import CompletedChange
from holdfast.trainer.reports import EventFile
from holdfast.trainer.run import RunDirectory, read_events
from holdfast.trainer.step import Training, lasting


@dataclass(frozen=True, slots=True)
class ChangeFiles:
    """The files of a run that one process records changes in."""

    run: RunDirectory
    events: EventFile
    incidents: WholeFiles

    @staticmethod
    def of(run: RunDirectory, events: EventFile) -> ChangeFiles:
        """The files of a run; errors of incidents are told with those of events."""
        return ChangeFiles(run, events, WholeFiles(run.incidents, events.word))


@dataclass(frozen=True, slots=True)
class ChangeRecord:
    """A completed membership change, as one rank knows it."""

    change: CompletedChange
    heard: tuple[MembershipEvent, ...]
    plan: Plan
    """The plan in force since then."""
    step: int
    """The number of steps committed at that time."""
    urgent: bool
    """Whether it interrupted a step."""
    slowness: tuple[tuple[int, int], ...]
    """The slow ranks that it knew of."""
    recomputed: int
    """The micro-batches of the interrupted step that are recomputed, over all ranks."""
    digest: str
    """The digest of the state after it; see `holdfast.trainer.elastic.corruption`."""


def record_of(
    change: CompletedChange,
    heard: Sequence[MembershipEvent],
    training: Training,
    *,
    urgent: bool,
    digest: str,
) -> ChangeRecord:
    """The record of a change, made before the next step changes the state. Local."""
    replayed = urgent and change.recovery.repeats_step
    return ChangeRecord(
        change=change,
        heard=tuple(heard),
        plan=training.plan,
        step=training.progress.decided,
        urgent=urgent,
        slowness=lasting(training.progress.recent.slowness),
        recomputed=len(training.to_compute(change.recovery.steps)) if replayed else 0,
        digest=digest,
    )


def write_changes(files: ChangeFiles, records: Sequence[ChangeRecord]) -> None:
    """Write the events and incidents of changes that are not written yet. One rank calls it.

    The newest change, which is the last, is for this rank to write. Those before it were for other
    ranks, which may have died before they wrote them.
    """
    *earlier, newest = records
    written = _written(files.run) if earlier else set()
    for record in earlier:
        if record.change.after.number not in written:
            _write(files, record)
    _write(files, newest)


def _written(run: RunDirectory) -> set[int]:
    """The generations of this start of the run that have events."""
    events = read_events(run.events)
    since = events[newest_start(events) or 0 :]
    numbers = (event.get("generation") for event in since if event["event"] in CHANGES)
    return {number for number in numbers if isinstance(number, int)}


def _write(files: ChangeFiles, record: ChangeRecord) -> None:
    change, urgent = record.change, record.urgent
    found = change_events(change.before, change.after, record.heard)
    lost = [event.fields for event in found if event.name == "rank_lost"]
    first = change.before is None
    steps = change.recovery.steps
    replayed = int(urgent and change.recovery.repeats_step)
    rolled_back = 0 if change.from_checkpoint is None or first else steps - change.from_checkpoint
    fields: dict[str, Any] = {
        "generation": change.after.number,
        "lost": [found["rank"] for found in lost],
        "left": [event.fields["rank"] for event in found if event.name == "rank_left"],
        "joined": [event.fields["rank"] for event in found if event.name == "rank_joined"],
        "leaving": [member.rank for member in change.after.members if member.leaving],
        "step": record.step,
        "within_step": urgent,
        "committed": urgent and not replayed and change.from_checkpoint is None,
        "replayed_steps": rolled_back + replayed,
        "recomputed_micro_batches": record.recomputed,
        "notice_s": max((s for found in lost if (s := found["detected_s"])), default=None),
        "agree_s": change.agree_s,
        "edit_s": change.edit_s,
        "move_s": change.move_s,
        "total_s": change.total_s,
        "moved_bytes": change.moved_bytes,
        "filled": change.recovery.filled,
        "slowness": record.slowness,
        "waiting": sorted(_given(record.plan)),
        "placed": sorted(_given(change.plan_before) & _placed(record.plan)),
        "from_checkpoint": change.from_checkpoint,
    }
    plan = plan_to_data(record.plan)
    if lost:
        incident = _incident(change, record.heard, fields, lost, plan, record.digest)
        path = files.run.incidents / f"generation-{change.after.number:06d}.json"
        files.incidents.put(path, (json.dumps(incident, indent=1) + "\n").encode())
    name = "recovered" if lost else "generation"
    events = [*((event.name, event.fields) for event in found), (name, {**fields, "plan": plan})]
    if record.plan.slowness != change.plan_before.slowness and not first:
        events.append(("relieved", _relief(record.plan, record.step)))
    files.events.extend(events)


def _relief(plan: Plan, step: int) -> dict[str, Any]:
    """The fields of the event that micro-batches are divided by other speeds from now on."""
    counts = {}
    for rank in plan.stage_replicas.ranks:
        at = plan.stage_replicas.find(rank)
        counts[rank] = 0 if at is None else len(plan.micro_batches_of(at.pipeline, at.data))
    total = sum(map(len, plan.micro_batches))
    told = [
        f"rank {rank} takes {times / 100:g} times as long and computes {counts[rank]} of {total}"
        for rank, times in plan.slowness
    ]
    said = ", ".join(told) or "all ranks have the usual speed again"
    return {
        "step": step,
        "slowness": {rank: times / 100 for rank, times in plan.slowness},
        "micro_batches": counts,
        "message": f"micro-batches are divided by speed after step {step}: {said}",
    }


def _incident(
    change: CompletedChange,
    heard: Sequence[MembershipEvent],
    fields: dict[str, Any],
    lost: list[dict[str, Any]],
    plan: dict[str, Any],
    digest: str,
) -> dict[str, Any]:
    """The contents of an incident file: all that is known."""
    recovery = change.recovery
    return {
        "time": time.time(),
        **fields,
        "losses": lost,
        "notices": [event_to_data(event) for event in heard if event.kind != "examined"],
        "evidence": _evidence(heard),
        "before": _members(change.before),
        "after": _members(change.after),
        "agreed": {
            "installed": recovery.active,
            "holders": recovery.holders,
            "steps": recovery.steps,
            "updates": recovery.updates,
            "complete": recovery.complete,
            "outcome": None if recovery.outcome is None else asdict(recovery.outcome),
        },
        "plan_before": plan_to_data(change.plan_before),
        "plan_after": plan,
        "state_digest": digest,
    }


def _evidence(heard: Sequence[MembershipEvent]) -> list[dict[str, Any]]:
    """Where the evidence about each worker is, and the line of Python that it was in, if known."""
    found: dict[str, dict[str, Any]] = {}
    for event in heard:
        if event.evidence and (event.kind == "examined" or event.evidence not in found):
            found[event.evidence] = {
                "rank": event.identity.rank,
                "incarnation": event.identity.incarnation,
                "node": event.node,
                "place": event.cause if event.kind == "examined" else "",
                "file": event.evidence,
            }
    return list(found.values())


def _given(plan: Plan) -> set[int]:
    """The ranks that compute nothing yet, and get state in the background."""
    coming = incoming_blocks(plan, plan.stage_replicas.spares)
    return {rank for rank, keys in coming.items() if keys}


def _placed(plan: Plan) -> set[int]:
    return set(plan.stage_replicas.ranks) - set(plan.stage_replicas.spares)


def _members(generation: Generation | None) -> list[dict[str, Any]]:
    """Every member with its report: its progress, and its last operations."""
    if generation is None:
        return []
    return [
        {
            "rank": member.rank,
            "incarnation": member.identity.incarnation,
            "node": member.node,
            "held": member.held,
            "step": member.step,
            "phase": member.phase,
            "leaving": member.leaving,
            "reported": dict(member.data),
        }
        for member in generation.members
    ]
